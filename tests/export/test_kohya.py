"""kohya's LoRA: read, written back, and refused where it is broken."""

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from drawing import draw
from kohya_files import MID, kohya_layer
from safetensors import safe_open
from safetensors.torch import save_file

from agsm_rl.adapters.lora import LoRA
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach, read_export, save_adapters
from agsm_rl.export.convert import convert
from agsm_rl.export.kohya_layers import HADA


def test_kohya_s_lora_draws_the_same_picture_through_diffusers(exported, tmp_path, each_checkpoint):
    pipeline = AutoPipelineForText2Image.from_pretrained(each_checkpoint)
    out = tmp_path / "kohya.safetensors"
    if hasattr(pipeline, "transformer"):
        with pytest.raises(UserError, match="so does ComfyUI, except that it ignores alpha"):
            convert(exported, out, "kohya")
        return
    base = draw(pipeline)
    handle = attach(pipeline, exported / "adapter" / "pytorch_lora_weights.safetensors")
    wanted = draw(pipeline)
    handle.detach()
    convert(exported, out, "kohya")
    with safe_open(out, framework="pt") as content:
        names = set(content.keys())
    assert all(name.startswith("lora_unet_") for name in names)
    assert {name.partition(".")[2] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    pipeline.load_lora_weights(out)
    torch.testing.assert_close(draw(pipeline), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, base, rtol=0, atol=1e-3)


def test_kohya_s_lora_is_read_back_exactly_with_where_it_came_from(each_backbone, each_checkpoint, tmp_path):
    if hasattr(each_backbone.pipeline, "transformer"):
        pytest.skip("kohya's form has no names for SD3's layers")
    lora = LoRA(rank=2, alpha=3.0, target_modules=("attn2.to_k", "to_out.0", "ff.net.2", "proj_in"))
    lora.attach(each_backbone)
    for _, parameter in lora.named_parameters():
        parameter.data += 0.2
    origin = {"step": "7", "objectives": '["agsm"]', "recipe_sha256": "ab", "checkpoint": "x", "version": "0"}
    (file,) = save_adapters({"lora": lora}, tmp_path / "adapter", metadata=origin)
    notes = []
    convert(file, tmp_path / "kohya.safetensors", "kohya", tell=notes.append)
    assert notes == []  # one bank, and nothing beside it
    (back,) = convert(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors")
    (before, told), (after, told_after) = read_export(file), read_export(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(told_after[name] == told[name] for name in ("base", "banks", "kind", *origin))
    pipeline = AutoPipelineForText2Image.from_pretrained(each_checkpoint)
    base = draw(pipeline)
    handle = attach(pipeline, file)
    wanted = draw(pipeline)
    handle.detach()
    handle = attach(pipeline, back)
    assert torch.equal(draw(pipeline), wanted) and not torch.equal(wanted, base)
    handle.detach()
    pipeline.load_lora_weights(back)
    torch.testing.assert_close(draw(pipeline), wanted, rtol=0, atol=1e-5)


def test_text_encoders_go_through_kohya_s_form_and_back(each_backbone, each_checkpoint, tmp_path):
    lora = LoRA(rank=2, alpha=3.0, banks=2, text_encoders=True)
    lora.attach(each_backbone)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in lora.named_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    (file,) = save_adapters({"lora": lora}, tmp_path / "adapter", metadata={})
    out = tmp_path / "kohya.safetensors"
    if hasattr(each_backbone.pipeline, "transformer"):
        with pytest.raises(UserError, match="so does ComfyUI, except that it ignores alpha"):
            convert(file, out, "kohya")
        return
    convert(file, out, "kohya")
    with safe_open(out, framework="pt") as content:
        names = list(content.keys())
    text = {name.partition("_text_model_")[0] for name in names if not name.startswith("lora_unet_")}
    assert text == ({"lora_te1", "lora_te2"} if len(each_backbone.text_encoders) == 2 else {"lora_te"})
    (back,) = convert(out, tmp_path / "back.safetensors")
    before, after = read_export(file)[0], read_export(back)[0]
    assert after.keys() == {name for name in before if not name.startswith("negative.")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    wanted = draw(each_backbone.pipeline)
    pipeline = AutoPipelineForText2Image.from_pretrained(each_checkpoint)
    base = draw(pipeline)
    handle = attach(pipeline, back)
    assert torch.equal(draw(pipeline), wanted) and not torch.allclose(wanted, base, rtol=0, atol=1e-3)
    handle.detach()
    for theirs in (out, back):
        pipeline.load_lora_weights(theirs)
        torch.testing.assert_close(draw(pipeline), wanted, rtol=0, atol=1e-5)
        pipeline.unload_lora_weights()


def test_kohya_s_lora_may_have_sdxl_s_original_names_and_no_alpha(tmp_path):
    names = {
        "input_blocks_4_1_transformer_blocks_0_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
        "middle_block_1_transformer_blocks_3_attn2_to_k": "mid_block.attentions.0.transformer_blocks.3.attn2.to_k",
        "output_blocks_2_1_transformer_blocks_9_attn1_to_q": "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_q",
    }
    tensors = [kohya_layer(f"lora_unet_{name}", alpha=None) for name in names]
    save_file(tensors[0] | tensors[1] | tensors[2], tmp_path / "kohya.safetensors")
    (out,) = convert(tmp_path / "kohya.safetensors", tmp_path / "out.safetensors", "agsm-rl")
    found, metadata = read_export(out)
    assert set(found) == {f"unet.{name}.lora_{part}.weight" for name in names.values() for part in "AB"}
    assert metadata["base"] == "stable_diffusion_xl"
    assert LoRA.from_export(found, metadata).alpha == 2


def test_kohya_s_text_encoders_may_have_more_layers_than_attention(tmp_path):
    layers = ["lora_te_text_model_encoder_layers_11_mlp_fc1", "lora_te_text_model_encoder_layers_1_self_attn_q_proj"]
    save_file(kohya_layer(f"{MID}q") | kohya_layer(layers[0]) | kohya_layer(layers[1]), tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", tmp_path / "out.safetensors")
    found, metadata = read_export(tmp_path / "out.safetensors")
    text = "text_encoder.text_model.encoder.layers."
    assert {name for name in found if name.startswith("text_encoder")} == {
        f"{text}{name}.lora_{part}.weight" for name in ("11.mlp.fc1", "1.self_attn.q_proj") for part in "AB"
    }
    lora = LoRA.from_export(found, metadata)
    assert (lora.rank, lora.alpha, lora.changes_text) == (2, 4, True)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds nothing"),
        (kohya_layer("lora_te_text_model_encoder_layers_0_mlp_fc1"), "a U-Net .*in kohya's form.*holds lora_te_text_"),
        (kohya_layer(f"{MID}q") | kohya_layer("lora_te3_encoder_block_0_layer_0_SelfAttention_q"), "holds lora_te3_"),
        (kohya_layer(f"{MID}q") | kohya_layer("lora_te_text_model_odd"), "cannot place"),
        (kohya_layer(f"{MID}q", dora_scale=torch.ones(1, 2048)), r"dora_scale has shape \(1, 2048\); only lengths"),
        (kohya_layer(f"{MID}q", dora_scale=torch.ones(8, 1)) | kohya_layer(f"{MID}k"), "all must have it, or none"),
        (kohya_layer(f"{MID}q") | {f"{MID}k.{name}": torch.ones(2, 2) for name in HADA}, "several kinds .loha, lora."),
        ({f"{MID}q.oft_blocks": torch.ones(2, 4, 4)}, rf"holds {MID}q \(OFT\)"),
        ({f"{MID}q.lora_down.weight": torch.ones(2, 8)}, f"holds {MID}q"),
        (kohya_layer("lora_unet_middle_block_7_x"), "diffusers cannot place"),
        (kohya_layer(f"{MID}q", alpha=torch.tensor(float("inf"))), "alpha' holds numbers that are not finite"),
        (kohya_layer(f"{MID}q", alpha=torch.tensor(-1.0)), "alpha' is -1.0; it must be a finite number above 0"),
        (kohya_layer(f"{MID}q", alpha=torch.ones(2)), r"alpha' is \(2,\); it must be"),
        (kohya_layer(f"{MID}q", rank=0), f"'{MID}q': its rank is 0"),
        (
            kohya_layer(f"{MID}q", **{"lora_up.weight": torch.full((8, 2), 1e300, dtype=torch.float64)}),
            "up.weight' holds numbers",
        ),
    ],
)
def test_another_lora_in_kohya_s_form_is_the_user_s_error(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "kohya.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()

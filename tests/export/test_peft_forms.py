"""DoRA, rsLoRA, LoKr, LoHa and OFT in other tools' files: each reader predicts what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from agsm_rl.adapters.loha import LoHa
from agsm_rl.adapters.lokr import LoKr
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.oft import OFT
from agsm_rl.backbones import backbone_of, load_backbone
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach, save_adapters
from agsm_rl.export.convert import convert
from agsm_rl.interfaces import Backbone

PROJECTION = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
EVERYWHERE: dict[str, Any] = {"banks": 2, "text_encoders": True}
LORAS = {
    "dora, ranks differ": lambda: LoRA(rank=2, alpha=3, use_dora=True, rank_pattern={PROJECTION: 3}, **EVERYWHERE),
    "rslora, ranks and alphas differ": lambda: LoRA(
        rank=4, alpha=3, use_rslora=True, rank_pattern={"to_k": 2}, alpha_pattern={"v_proj": 5}, **EVERYWHERE
    ),
    "convolutions": lambda: LoRA(rank=2, use_dora=True, target_modules=("conv1", "proj_in")),
}
LYCORIS = {
    "lokr": lambda: LoKr(rank=3, alpha=2, target_modules=("conv1", "proj_in", "to_k"), **EVERYWHERE),
    "lokr, both decomposed": lambda: LoKr(rank=1, alpha=3, decompose_both=True, decompose_factor=4, **EVERYWHERE),
    "loha": lambda: LoHa(rank=2, alpha=1, rank_pattern={"to_k": 3}, **EVERYWHERE),
}


@torch.no_grad()
def predict(backbone: Backbone) -> Tensor:
    x_t = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(7))
    return backbone.predict(x_t, torch.tensor([0.1234, 0.9]), backbone.encode_text(["a red circle", "two"]))


def trained(make: Any, backbone: Backbone, folder: Path) -> tuple[Path, Tensor]:
    """An export, and what is predicted under it."""
    adapter = make()
    adapter.attach(backbone)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in adapter.named_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    (file,) = save_adapters({"x": adapter}, folder, metadata={})
    wanted = predict(backbone)
    adapter.detach()
    assert (predict(backbone) - wanted).abs().max() > 1e-3
    return file, wanted


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", LORAS)
def test_diffusers_kohya_s_form_and_a_fused_base_predict_the_same(case, backbone, tiny_checkpoint, tmp_path):
    file, wanted = trained(LORAS[case], backbone, tmp_path)
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    convert(file, kohya, "kohya")
    convert(kohya, back)
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_checkpoint)
    for written in (file, back):
        pipeline.load_lora_weights(written)
        same(predict(backbone_of(pipeline)), wanted)
        pipeline.unload_lora_weights()
        handle = attach(pipeline, written)
        same(predict(backbone_of(pipeline)), wanted)
        handle.detach()
    for written in (file, kohya):
        same(predict(load_backbone(str(tiny_checkpoint), device="cpu", lora=str(written))), wanted)


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris_names_go_there_and_back(case, backbone, tmp_path):
    file, wanted = trained(LYCORIS[case], backbone, tmp_path)
    assert file.name == "x.safetensors"
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    convert(file, kohya, "kohya")
    names = {name.partition(".")[2] for name in load_file(kohya)}
    assert all(name == "alpha" or name.startswith(("lokr_w", "hada_w")) for name in names)
    convert(kohya, back)
    handle = attach(backbone.pipeline, back)
    same(predict(backbone), wanted)
    handle.detach()


def test_whole_matrices_of_a_lokr_are_written_at_the_scale_of_one_that_its_readers_give_them(backbone, tmp_path):
    file, _ = trained(lambda: LoKr(rank=16, alpha=4, target_modules=("attn2.to_k",)), backbone, tmp_path)
    convert(file, tmp_path / "kohya.safetensors", "kohya")
    ours, theirs = load_file(file), load_file(tmp_path / "kohya.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    first = theirs[f"lora_unet_{name.replace('.', '_')}.lokr_w1"]
    assert torch.equal(first, ours[f"unet.{name}.lokr_w1"] / 4)
    assert torch.equal(theirs[f"lora_unet_{name.replace('.', '_')}.lokr_w2"], ours[f"unet.{name}.lokr_w2"])


@pytest.mark.parametrize("make", [lambda: OFT(oft_block_size=8), LORAS["convolutions"], lambda: LoKr(rank=2, alpha=3)])
def test_peft_reads_its_own_form(make, backbone, tmp_path):
    file, wanted = trained(make, backbone, tmp_path / "ours")
    written = convert(file, tmp_path / "peft", "peft")
    assert [str(each.relative_to(tmp_path / "peft")) for each in written] == [
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
    ]
    PeftModel.from_pretrained(backbone.denoiser, tmp_path / "peft" / "unet")
    same(predict(backbone), wanted)


def test_what_a_form_cannot_hold_is_refused_with_what_can(backbone, tmp_path):
    file, _ = trained(OFT, backbone, tmp_path / "oft")
    with pytest.raises(UserError, match=r"holds: x.safetensors \(oft\)\. PEFT's OFT has no other form .* --to peft"):
        convert(file, tmp_path / "kohya.safetensors", "kohya")
    file, _ = trained(LYCORIS["loha"], backbone, tmp_path / "loha")
    with pytest.raises(UserError, match="changes text_encoder too, .*attach"):
        convert(file, tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists() and not (tmp_path / "kohya.safetensors").exists()

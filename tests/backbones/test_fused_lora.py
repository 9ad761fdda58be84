"""A LoRA fused into a base: the weights are those that its own library would make, on every kind of base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import _unet
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_unet, tiny_xl_unet

from agsm_rl.adapters.lora_names import LayerNames
from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError


def load(checkpoint: Path, **options: Any) -> Any:
    return load_backbone(str(checkpoint), **({"device": "cpu"} | options))


@pytest.mark.parametrize("make", [tiny_unet, tiny_xl_unet])
def test_a_u_net_s_original_names_are_those_of_its_authors_files(make):
    unet = make()
    names = LayerNames({"unet": unet})
    modules = {weight.data_ptr(): name.removesuffix(".weight") for name, weight in unet.named_parameters()}
    checked = 0
    for original, tensor in _unet(unet).items():
        if original.endswith(".weight") and tensor.ndim > 1:
            module = modules[tensor.data_ptr()]
            layer = original.removesuffix(".weight")
            assert names.find(f"lora_unet_{layer.replace('.', '_')}") == ("unet", module)
            assert names.find(f"diffusion_model.{layer}") == ("unet", module)
            checked += 1
    assert checked > 50


def saved_by_peft(model: Any, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Write a PEFT model's adapter; the model's weights with the adapter merged."""
    wrapped = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options))
    wrapped.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 16, "target_modules": ["to_q", "to_out.0"], "alpha_pattern": {"attn2.to_q": 3}},
        {"lora_alpha": 2, "use_rslora": True, "target_modules": ["to_k", "proj_in"], "rank_pattern": {"proj_in": 2}},
    ],
)
def test_an_adapter_that_peft_saved_is_fused_with_its_alpha(each_checkpoint, tmp_path, options):
    base = load(each_checkpoint)
    if base.part == "transformer":
        options = {"lora_alpha": 16, "target_modules": ["to_q", "add_k_proj"]}
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    wanted = saved_by_peft(base.denoiser, tmp_path / "peft", **options)
    for given in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        got = load(each_checkpoint, lora=str(given)).denoiser.state_dict()
        assert got.keys() == wanted.keys() == before.keys()
        assert all(torch.allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5) for name in wanted)
        assert not all(torch.allclose(got[name], before[name], atol=1e-3) for name in wanted)
    load(each_checkpoint, lora=str(tmp_path / "peft"), device="meta")


def test_a_text_encoder_s_adapter_is_used_where_only_one_can_be_meant(tiny_checkpoint, tiny_xl_checkpoint, tmp_path):
    encoder = load(tiny_checkpoint).pipeline.text_encoder
    wanted = saved_by_peft(encoder, tmp_path, lora_alpha=16, target_modules=["q_proj"])
    got = load(tiny_checkpoint, lora=str(tmp_path)).pipeline.text_encoder.state_dict()
    assert all(torch.allclose(got[name], wanted[name], atol=1e-5) for name in wanted)
    with pytest.raises(UserError, match="this base has no layer for 2 of the file's 2"):
        load(tiny_xl_checkpoint, lora=str(tmp_path))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_lora_that_fits_only_partly_is_refused_before_anything_is_trained(tiny_checkpoint, tmp_path, device):
    saved_by_peft(load(tiny_checkpoint).denoiser, tmp_path, lora_alpha=16, target_modules=["to_q"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    stray = {f"base_model.model.nowhere.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}
    save_file(tensors | stray, file)
    with pytest.raises(UserError, match=r"no layer for 1 of the file's .*: base_model.model.nowhere\. Its layers are"):
        load(tiny_checkpoint, lora=str(file), device=device)


def test_of_several_files_in_a_folder_none_is_guessed(tiny_checkpoint, tmp_path):
    for name in ("a", "pytorch_lora_weights"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"2 .safetensors files \(a.safetensors, pytorch_lora_weights.safetensors\)"):
        load(tiny_checkpoint, lora=str(tmp_path))
    (tmp_path / "empty" / "lora").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, tmp_path / "empty" / "lora" / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"no .safetensors file in .*empty\. .*lora/adapter_model.safetensors may be me"
    ):
        load(tiny_checkpoint, lora=str(tmp_path / "empty"))


def test_an_export_with_two_banks_is_fused_with_the_positive_one_and_says_so(
    make_policy, tiny_checkpoint, tmp_path, caplog
):
    from agsm_rl.export.attach import save_adapters

    policy = make_policy()
    (file,) = save_adapters({"lora": policy.adapters["lora"]}, tmp_path, metadata={})
    load(tiny_checkpoint, lora=str(file))
    assert "has a bank for negative prompts, which is left out" in caplog.text

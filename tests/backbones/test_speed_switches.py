"""Attention kernels, compiling block by block, TF32: the same results, or a clear word on why not on this machine."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch._inductor import config as inductor_config

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.attention import choose_attention
from agsm_rl.doctor.memory.predict import Prediction, predict
from agsm_rl.errors import UserError
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe


def test_a_kernel_of_torchs_own_gives_the_same_predictions(each_checkpoint: Path) -> None:
    predictions = []
    for attention in (None, "native", "_native_math"):
        backbone = load_backbone(str(each_checkpoint), device="cpu", attention=attention)
        cond = backbone.encode_text(["a red star"])
        x_t = torch.ones(1, *backbone.latent_shape)
        predictions.append(backbone.predict(x_t, torch.tensor([0.5]), cond))
    assert torch.equal(predictions[0], predictions[1])
    torch.testing.assert_close(predictions[0], predictions[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flahs", r"Did you mean 'flash'"),
        ("flash_hub", r"code that diffusers would fetch from the hub.*write one of .*flash"),
        ("sage", r"calls torch's own attention, so diffusers cannot give it 'sage'; write one of native"),
        ("_native_cudnn", r"'_native_cudnn' does not work on cpu in float32 \(.*write another one, such as native"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused_by_check_too(tiny_checkpoint: Path, attention, message) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match=r"backbone\.attention: .*" + message):
            load_backbone(str(tiny_checkpoint), device=device, attention=attention)


def test_a_denoiser_that_asks_diffusers_for_its_kernel_is_given_it() -> None:
    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    denoiser = FluxTransformer2DModel(**sizes, axes_dims_rope=(2, 2, 4))
    before = _AttentionBackendRegistry.get_active_backend()
    choose_attention(denoiser, "_native_math", torch.device("cpu"))
    kernels = {module.processor._attention_backend for module in denoiser.modules() if hasattr(module, "processor")}
    assert kernels == {AttentionBackendName._NATIVE_MATH}
    assert _AttentionBackendRegistry.get_active_backend() == before  # other models keep theirs
    choose_attention(denoiser, "_native_flash", torch.device("cpu"))
    with pytest.raises(UserError, match=r"'_native_flash' does not work on cpu .*mask` is not supported"):
        choose_attention(denoiser, "_native_flash", torch.device("cpu"), masked=True)
    with pytest.raises(UserError, match=r"backbone\.attention: .*sageattention.*Or leave it out"):
        choose_attention(denoiser, "sage", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_blocks_compiled_one_by_one_learn_the_same_under_gradient_checkpointing(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ModelMixin.compile_repeated_blocks
    # Traced and run by Python: compiling kernels for each block takes minutes.
    monkeypatch.setattr(ModelMixin, "compile_repeated_blocks", lambda denoiser: whole(denoiser, backend="eager"))
    found = []
    for compiled in (None, "regional"):
        options = {"compile": compiled, "gradient_checkpointing": True}
        backbone = load_backbone(str(tiny_checkpoint), device="cpu", **options)
        policy = Policy(backbone, {"lora": LoRA(rank=2, banks=2)})
        parameters = [*policy.parameters().values()]
        for parameter in parameters:
            torch.nn.init.constant_(parameter, 0.02)
        x_t = torch.linspace(-1, 1, 2 * backbone.denoiser.config.in_channels * backbone.latent_shape[1] ** 2)
        x_t, cond = x_t.reshape(2, *backbone.latent_shape), backbone.encode_text(["a red star", "green"])
        prediction = policy.live(x_t, torch.tensor([0.2, 0.7]), cond)
        found.append(
            [prediction.detach(), *torch.autograd.grad(prediction.square().mean(), parameters, allow_unused=True)]
        )
    assert any(module._compiled_call_impl is not None for module in backbone.denoiser.modules())
    torch.compiler.reset()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_check_tries_the_switches_and_predicts_the_memory_with_all_of_them(tiny_checkpoint: Path, caplog) -> None:
    backbone = {"use": "auto", "checkpoint": str(tiny_checkpoint), "attention": "_native_math", "compile": "regional"}
    backbone |= {"gradient_checkpointing": True, "vae_slicing": True, "vae_tiling": True, "cpu_offload": "model"}
    content = {
        "steps": 2,
        "backbone": backbone | {"text": {"keep": "cache"}, "allow_tf32": True},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "optimizer": {"use": "adamw", "fused": True},
        "objectives": [{"use": "agsm", "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4}}],
    }
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        _, prediction = predict(Recipe.from_data(content, where="recipe.yaml"))
    assert isinstance(prediction, Prediction), prediction
    assert "backbone.compile: will be left out, nothing can be compiled here: " in caplog.text
    assert "backbone.allow_tf32: without effect" in caplog.text


def test_tf32_says_that_it_has_no_effect_on_a_cpu(tiny_checkpoint: Path, caplog) -> None:
    torch.set_float32_matmul_precision("highest")  # whatever ran before in this process
    load_backbone(str(tiny_checkpoint), device="cpu", allow_tf32=True)
    assert "backbone.allow_tf32: without effect, because a CPU has no TF32" in caplog.text
    assert torch.get_float32_matmul_precision() == "highest"

"""A base in few bits: the plain quantised pipeline, bit for bit, with adapters in float32 on top."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline

import agsm_rl.backbones.quantization as quantization
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.quantization import pipeline_config
from agsm_rl.backbones.quantized_layers import QuantizedLinear, quantization_of, stored_tensors
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach, save_adapters
from agsm_rl.policy import Policy

PROMPTS = ["a red star", "two blue circles"]


@pytest.fixture(scope="module")
def needs_torchao():
    pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def plain(needs_torchao, tiny_sd3_checkpoint):
    """The pipeline as diffusers loads and quantises it."""
    return load_plain(tiny_sd3_checkpoint, "int8")


def load_plain(checkpoint, kind, dtype=torch.bfloat16):
    made = pipeline_config(kind, str(checkpoint), dtype=dtype)
    pipeline = DiffusionPipeline.from_pretrained(str(checkpoint), torch_dtype=dtype, quantization_config=made)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_quantised(checkpoint, kind, dtype="bfloat16", **options):
    return load_backbone(str(checkpoint), quantize=kind, dtype=dtype, device="cpu", **options)


def draw(pipeline, **options):
    noise = torch.Generator().manual_seed(0)
    drawn = pipeline(PROMPTS, num_inference_steps=2, generator=noise, output_type="pt", height=16, width=16, **options)
    return drawn.images


def predict(backbone, policy=None):
    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    predictor = backbone.predict if policy is None else policy.reference
    return predictor(noise, torch.tensor([0.3, 0.8]), backbone.encode_text(PROMPTS))


@pytest.mark.parametrize(("kind", "checkpoint"), [("int8", "tiny_sd3_checkpoint"), ("fp8", "tiny_checkpoint")])
def test_the_reference_is_the_plain_quantised_pipeline_bit_for_bit(needs_torchao, request, kind, checkpoint):
    folder = request.getfixturevalue(checkpoint)
    plain, backbone = load_plain(folder, kind), load_quantised(folder, kind)
    assert quantization_of(backbone.denoiser) == quantization_of(backbone.pipeline.text_encoder) == kind
    assert torch.equal(draw(plain), draw(backbone.pipeline))
    before = predict(backbone)
    policy = Policy(backbone, {"tokens": SoftTokens(num_tokens=2), "lora": LoRA(rank=2, banks=2)}, ema_decay=0.9)
    for parameter in policy.parameters().values():
        assert parameter.dtype == torch.float32
        parameter.data.normal_()
    assert not torch.equal(policy.live(*inputs_of(backbone)), before)
    assert torch.equal(policy.reference(*inputs_of(backbone)), before)


def inputs_of(backbone):
    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return noise, torch.tensor([0.3, 0.8]), backbone.encode_text(PROMPTS)

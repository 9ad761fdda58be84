"""A base in few bits: the plain quantised pipeline, bit for bit, with adapters in float32 on top."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone, quantization
from agsm_rl.backbones.quantization import pipeline_config
from agsm_rl.backbones.quantized_layers import quantization_of
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach, save_adapters
from agsm_rl.policy import Policy

PROMPTS = ["a red star", "two blue circles"]


def load_plain(checkpoint, kind):
    """The pipeline as diffusers loads and quantises it."""
    made = pipeline_config(kind, str(checkpoint), dtype=torch.bfloat16)
    return DiffusionPipeline.from_pretrained(str(checkpoint), dtype=torch.bfloat16, quantization_config=made)


def load_quantised(checkpoint, kind, **options):
    return load_backbone(str(checkpoint), quantize=kind, dtype="bfloat16", device="cpu", **options)


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline(PROMPTS, num_inference_steps=2, generator=noise, output_type="pt", height=16, width=16).images


def inputs_of(backbone):
    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return noise, torch.tensor([0.3, 0.8]), backbone.encode_text(PROMPTS)


def perturbed_policy(backbone):
    """A policy whose adapters do something."""
    policy = Policy(backbone, {"tokens": SoftTokens(num_tokens=2), "lora": LoRA(rank=2)}, ema_decay=0.9)
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.parameters().values():
        parameter.data.normal_(generator=generator)
    return policy


@pytest.mark.parametrize(("kind", "checkpoint"), [("int8", "tiny_sd3_checkpoint"), ("fp8", "tiny_checkpoint")])
def test_the_reference_is_the_plain_quantised_pipeline_and_adapters_learn_on_it(
    request, kind, checkpoint, tmp_path, caplog
):
    pytest.importorskip("torchao")
    folder = request.getfixturevalue(checkpoint)
    plain, backbone = load_plain(folder, kind), load_quantised(folder, kind)
    assert quantization_of(backbone.denoiser) == quantization_of(backbone.pipeline.text_encoder) == kind
    base = draw(plain)
    assert torch.equal(base, draw(backbone.pipeline))
    assert backbone.identity("text") == load_quantised(folder, kind).identity("text")
    assert backbone.identity("text") != load_quantised(folder, None).identity("text")

    inputs = inputs_of(backbone)
    before = backbone.predict(*inputs)
    policy = perturbed_policy(backbone)
    assert torch.equal(policy.reference(*inputs), before)
    policy.live(*inputs).square().mean().backward()
    for name, parameter in policy.parameters().items():
        assert parameter.dtype == torch.float32 and parameter.grad is not None and parameter.grad.any(), name

    options = f'{{"quantize": "{kind}"}}'
    save_adapters(policy.adapters, tmp_path, metadata={"backbone_options": options})
    trained = draw(backbone.pipeline)
    assert not torch.equal(trained, base)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        handle = attach(plain, tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("agsm_rl")]
    assert torch.equal(draw(plain), trained)
    handle.detach()
    assert torch.equal(draw(plain), base)


def test_gradients_are_those_of_the_same_weights_in_floating_point(tiny_sd3_checkpoint):
    pytest.importorskip("torchao")
    backbone = load_quantised(tiny_sd3_checkpoint, "int8")
    layer = backbone.denoiser.transformer_blocks[0].attn.to_q
    plain = torch.nn.functional.linear
    x = torch.randn(3, layer.in_features, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x, layer.weight.dequantize().float(), layer.bias.float()).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_an_adapter_of_another_base_is_attached_with_a_warning(tiny_checkpoint, tmp_path, caplog):
    backbone = load_backbone(str(tiny_checkpoint), device="cpu")
    policy = perturbed_policy(backbone)
    save_adapters(policy.adapters, tmp_path, metadata={"backbone_options": '{"quantize": "int8"}'})
    pipeline = load_backbone(str(tiny_checkpoint), device="cpu").pipeline
    with caplog.at_level(logging.WARNING):
        attach(pipeline, tmp_path).detach()
    assert "was trained on a base quantised to int8, but this one is not quantised" in caplog.text


def test_the_size_of_a_base_in_few_bits_needs_no_library(tiny_sd3_checkpoint):
    def size_of(kind):
        denoiser = load_backbone(str(tiny_sd3_checkpoint), quantize=kind, dtype="bfloat16", device="meta").denoiser
        return sum(tensor.numel() * tensor.element_size() for tensor in (*denoiser.parameters(), *denoiser.buffers()))

    plain, int8, nf4 = (size_of(kind) for kind in (None, "int8", "nf4"))
    assert plain > int8 > nf4


def test_quantisation_that_is_not_possible_is_refused(tiny_checkpoint, monkeypatch):
    with pytest.raises(UserError, match=r"backbone.quantize: .*backbone.lora"):
        load_backbone(str(tiny_checkpoint), quantize="int8", lora="some.safetensors", device="meta")
    monkeypatch.setitem(quantization.LIBRARIES, "int8", ("no-such-package", (1, 0)))
    with pytest.raises(UserError, match=r"int8 needs no-such-package 1.0 or newer; none is installed.*quantize\]"):
        load_backbone(str(tiny_checkpoint), quantize="int8", device="cpu")
    monkeypatch.setitem(quantization.LIBRARIES, "nf4", ("torch", (2, 0)))
    with pytest.raises(UserError, match="nf4 needs a CUDA GPU"):
        load_backbone(str(tiny_checkpoint), quantize="nf4", device="cpu")

"""Exported adapters on plain pipelines: the same images, and nothing left behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionPipeline,
)
from safetensors.torch import save_file
from torch import Tensor

import agsm_rl
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach, find_exports, read_export, read_exports, save_adapters
from agsm_rl.interfaces import Adapter, Backbone


def draw(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    result = pipeline(["a red circle"], num_inference_steps=3, output_type="pt", generator=generator)
    return torch.as_tensor(result.images)


def plain_pipeline(checkpoint: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)


def snapshot(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    unet = pipeline.unet
    return {
        "modules": [(name, type(module), module.training) for name, module in unet.named_modules()],
        "weights": {name: (value.data_ptr(), value.requires_grad) for name, value in unet.named_parameters()},
        "values": {name: value.sum().item() for name, value in unet.state_dict().items()},
        "hooks": sum(len(module._forward_pre_hooks) for module in unet.modules()),
    }


def trained(backbone: Backbone) -> dict[str, Adapter]:
    adapters: dict[str, Adapter] = {"tokens": SoftTokens(num_tokens=3), "lora": LoRA(rank=2, banks=2)}
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters.values():
        adapter.attach(backbone)
        for _, parameter in adapter.named_parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapters


@pytest.fixture
def exported(backbone: StableDiffusion, tmp_path: Path) -> Path:
    """A run folder with both kinds of adapter."""
    save_adapters(trained(backbone), tmp_path / "run" / "adapter", metadata={"step": "400"})
    return tmp_path / "run"


def test_the_package_s_attach_is_the_function() -> None:
    assert agsm_rl.attach is attach


def test_attached_adapters_draw_what_the_trained_ones_draw(
    backbone: StableDiffusion, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapters = trained(backbone)
    save_adapters(adapters, tmp_path, metadata={})
    pipeline = plain_pipeline(tiny_checkpoint)
    base = draw(pipeline)
    attach(pipeline, tmp_path)
    assert torch.equal(draw(pipeline), draw(backbone.pipeline)) and not torch.equal(draw(pipeline), base)


def test_a_pipeline_that_is_offloaded_afterwards_draws_the_same(tiny_checkpoint: Path, exported: Path) -> None:
    plain, offloaded = plain_pipeline(tiny_checkpoint), plain_pipeline(tiny_checkpoint)
    for pipeline in (plain, offloaded):
        attach(pipeline, exported)
    for module in (offloaded.text_encoder, offloaded.unet, offloaded.vae):
        cpu_offload(module, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(draw(offloaded), draw(plain))
    with pytest.raises(UserError, match="Attach first, then offload"):
        attach(offloaded, exported)


def test_a_pipeline_whose_models_are_offloaded_in_turn_draws_the_same(tiny_checkpoint: Path, exported: Path) -> None:
    plain, offloaded = plain_pipeline(tiny_checkpoint), plain_pipeline(tiny_checkpoint)
    hook = None
    for module in (offloaded.text_encoder, offloaded.unet, offloaded.vae):
        _, hook = cpu_offload_with_hook(module, "cpu", prev_module_hook=hook)
    for pipeline in (plain, offloaded):
        attach(pipeline, exported)
    assert torch.equal(draw(offloaded), draw(plain))


def test_detach_gives_the_pipeline_back_bit_for_bit(tiny_checkpoint: Path, exported: Path) -> None:
    pipeline = plain_pipeline(tiny_checkpoint)
    pipeline.unet.train()
    before, image = snapshot(pipeline), draw(pipeline)
    handle = attach(pipeline, exported)
    assert set(handle.adapters) == {"pytorch_lora_weights", "tokens"}
    assert snapshot(pipeline) != before
    assert not any(parameter.requires_grad for parameter in pipeline.unet.parameters())
    handle.detach()
    handle.detach()
    assert snapshot(pipeline) == before
    assert torch.equal(draw(pipeline), image)


def test_one_file_is_attached_alone(tiny_checkpoint: Path, exported: Path) -> None:
    pipeline, diffusers_own = plain_pipeline(tiny_checkpoint), plain_pipeline(tiny_checkpoint)
    attach(pipeline, exported / "adapter" / "pytorch_lora_weights.safetensors")
    diffusers_own.load_lora_weights(exported / "adapter")
    assert torch.equal(draw(pipeline), draw(diffusers_own))


def test_several_loras_are_told_apart_by_their_names(backbone: StableDiffusion, tmp_path: Path) -> None:
    adapters: dict[str, Adapter] = {"first": LoRA(rank=2), "second": LoRA(rank=3, seed=1)}
    for adapter in adapters.values():
        adapter.attach(backbone)
    files = save_adapters(adapters, tmp_path, metadata={})
    assert [file.name for file in files] == ["first.safetensors", "second.safetensors"]


def test_two_files_of_one_name_are_refused_where_a_run_would_start_from_them(exported: Path) -> None:
    folder = exported / "adapter"
    shutil.copy(folder / "tokens.safetensors", folder / "older.safetensors")
    with pytest.raises(UserError, match="older.safetensors and tokens.safetensors are both an adapter named 'tokens'"):
        read_exports(exported)


def test_a_lora_saved_again_under_its_other_name_is_there_once(backbone: StableDiffusion, tmp_path: Path) -> None:
    adapters = {name: LoRA(rank=2) for name in ("lora", "second")}
    for adapter in adapters.values():
        adapter.attach(backbone)
    save_adapters({"lora": adapters["lora"]}, tmp_path, metadata={})
    save_adapters(adapters, tmp_path, metadata={})
    assert [file.name for file in find_exports(tmp_path)] == ["lora.safetensors", "second.safetensors"]
    save_adapters({"second": adapters["second"]}, tmp_path, metadata={})
    assert [file.name for file in find_exports(tmp_path)] == ["lora.safetensors", "pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("path", ["", "adapter", "adapter/tokens.safetensors"])
def test_a_truncated_file_is_the_users_error_and_changes_nothing(
    tiny_checkpoint: Path, exported: Path, path: str
) -> None:
    file = exported / "adapter" / "tokens.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    pipeline = plain_pipeline(tiny_checkpoint)
    before = snapshot(pipeline)
    with pytest.raises(UserError, match=r"tokens.safetensors: cannot be read"):
        attach(pipeline, exported / path)
    assert snapshot(pipeline) == before


def test_what_is_not_there_is_the_users_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = plain_pipeline(tiny_checkpoint)
    with pytest.raises(UserError, match="no such file or folder"):
        attach(pipeline, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no .safetensors file"):
        attach(pipeline, tmp_path)


def test_a_file_that_is_not_ours_is_refused_with_what_to_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = plain_pipeline(tiny_checkpoint)
    file = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"pipe.load_lora_weights"):
        attach(pipeline, file)
    save_file({"x": torch.zeros(1)}, file, {"kind": "soft_token"})
    with pytest.raises(UserError, match="Did you mean 'soft_tokens'"):
        attach(pipeline, file)
    with pytest.raises(UserError, match="supported: StableDiffusionPipeline"):
        attach(object.__new__(type("PixArtAlphaPipeline", (), {"components": {}})), _tokens(tmp_path, width=32))


def test_adapters_of_another_base_leave_the_pipeline_as_it_was(tiny_checkpoint: Path, exported: Path) -> None:
    _tokens(exported / "adapter", width=768)
    pipeline = plain_pipeline(tiny_checkpoint)
    before = snapshot(pipeline)
    with pytest.raises(UserError, match=r"these are 768 wide.*this base's are 32 wide \(stable_diffusion\)"):
        attach(pipeline, exported)
    assert snapshot(pipeline) == before


def _tokens(folder: Path, *, width: int) -> Path:
    file = folder / "tokens.safetensors"
    save_file({"soft_tokens": torch.zeros(2, 4, width)}, file, {"kind": "soft_tokens"})
    return file


def test_whoever_writes_an_export_it_says_the_version_and_the_base(each_backbone: Backbone, tmp_path: Path) -> None:
    for file in save_adapters(trained(each_backbone), tmp_path, metadata={}):
        _, metadata = read_export(file)
        assert (metadata["version"], metadata["base"]) == (agsm_rl.__version__, each_backbone.name)


def test_a_save_that_fails_keeps_the_file_there_was(
    backbone: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = trained(backbone)
    (file, _) = save_adapters(adapters, tmp_path, metadata={})
    before = file.read_bytes()

    def broken(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr("agsm_rl.export.attach.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_adapters(adapters, tmp_path, metadata={})
    assert file.read_bytes() == before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["pytorch_lora_weights.safetensors", "tokens.safetensors"]


def paint(pipeline: Any, kind: str) -> Tensor:
    """A picture changed as a prompt says, by image to image or by inpainting its left half."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"image": image, "strength": 0.8, "num_inference_steps": 4, "guidance_scale": 3.0}
    if kind == "inpaint":
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., :8] = 1
        options |= {"mask_image": mask, "height": 16, "width": 16}
    drawn = pipeline("a red circle", output_type="pt", generator=generator, **options)
    return torch.as_tensor(drawn.images)


@pytest.mark.parametrize("kind", ["image2image", "inpaint"])
def test_image_to_image_and_inpainting_draw_with_what_is_attached(
    each_backbone: Backbone, each_checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    save_adapters(trained(each_backbone), tmp_path, metadata={})
    plain = AutoPipelineForText2Image.from_pretrained(each_checkpoint)
    maker = AutoPipelineForImage2Image if kind == "image2image" else AutoPipelineForInpainting
    pipeline = maker.from_pipe(plain)
    base = paint(pipeline, kind)
    handle = attach(pipeline, tmp_path)
    changed = paint(pipeline, kind)
    assert not torch.allclose(changed, base, atol=1e-3)
    handle.detach()
    assert torch.equal(paint(pipeline, kind), base)
    attach(plain, tmp_path)  # they share their modules: what is on the one is on the other
    assert torch.equal(paint(pipeline, kind), changed)

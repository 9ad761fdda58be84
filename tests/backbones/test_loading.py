"""Where a base may come from: other denoisers, a LoRA fused in, single files in the original layout, and refusals."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler, StableDiffusion3Pipeline, UNet2DConditionModel
from original_layout import in_original_layout
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from tiny_pipelines import clip_config, make_sd3, tiny_transformer, tiny_unet
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from agsm_rl import registry
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.loading import unsupported
from agsm_rl.backbones.stable_diffusion_3 import StableDiffusion3
from agsm_rl.errors import UserError
from agsm_rl.evaluate.target import open_target
from agsm_rl.export.attach import save_adapters
from agsm_rl.interfaces import Backbone
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.policy import Policy


def load(checkpoint: Path | str, **options: Any) -> Any:
    return load_backbone(str(checkpoint), **({"device": "cpu"} | options))


def part_of(backbone: Backbone) -> str:
    return "unet" if hasattr(backbone.pipeline, "unet") else "transformer"


def draw(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("a red circle", num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt")
    return torch.as_tensor(drawn.images)


def other_pipeline(checkpoint: Path, folder: Path) -> Path:
    """A copy of a pipeline folder whose denoiser has other weights, as a published fine-tune has."""
    pipeline = AutoPipelineForText2Image.from_pretrained(checkpoint)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    pipeline.save_pretrained(folder)
    return folder


def test_a_denoiser_may_come_from_another_pipeline_s_folder_or_from_its_own(
    each_checkpoint: Path, tmp_path: Path
) -> None:
    other = other_pipeline(each_checkpoint, tmp_path / "other")
    base, wanted = load(each_checkpoint), load(other)
    part = part_of(base)
    assert not torch.allclose(draw(base.pipeline), draw(wanted.pipeline), atol=1e-3)
    for source in (other, other / part):
        found = load(each_checkpoint, **{part: str(source)})
        assert torch.equal(draw(found.pipeline), draw(wanted.pipeline))
        assert not any(parameter.requires_grad for parameter in found.denoiser.parameters())


def test_a_denoiser_of_another_width_is_refused_with_both_widths(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = {**tiny_unet().config, "cross_attention_dim": 48}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"backbone.unet.*cross_attention_dim 48, the checkpoint's unet 32"):
        load(tiny_checkpoint, unet=str(tmp_path / "wide"))


def test_a_replacement_that_a_base_has_no_place_for_or_that_is_not_there_is_told(
    tiny_checkpoint: Path, tiny_sd3_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="backbone.transformer: a StableDiffusionPipeline has no transformer"):
        load(tiny_checkpoint, transformer=str(tiny_sd3_checkpoint))
    with pytest.raises(UserError, match="backbone.unet: a StableDiffusion3Pipeline has no unet"):
        load(tiny_sd3_checkpoint, unet=str(tiny_checkpoint))
    with pytest.raises(UserError, match=r"backbone.unet: '.*empty' cannot be loaded"):
        (tmp_path / "empty").mkdir()
        load(tiny_checkpoint, unet=str(tmp_path / "empty"))


@pytest.mark.parametrize("text_encoders", [False, True])
def test_a_lora_is_fused_as_diffusers_fuses_it_and_leaves_no_trace(
    each_checkpoint: Path, tmp_path: Path, text_encoders: bool
) -> None:
    lora = LoRA(rank=2, alpha=3, text_encoders=text_encoders)
    lora.attach(load(each_checkpoint))
    generator = torch.Generator().manual_seed(0)
    for _, parameter in lora.named_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    (file,) = save_adapters({"lora": lora}, tmp_path, metadata={})
    plain = AutoPipelineForText2Image.from_pretrained(each_checkpoint)
    base = draw(plain)
    plain.load_lora_weights(file)
    plain.fuse_lora()
    plain.unload_lora_weights()
    for given in (file, tmp_path):
        fused = load(each_checkpoint, lora=str(given))
        assert torch.equal(draw(fused.pipeline), draw(plain))
    assert not torch.allclose(draw(plain), base, atol=1e-3)
    for model in (fused.denoiser, *fused.text_encoders.values()):
        assert not hasattr(model, "peft_config") and not any(isinstance(m, BaseTunerLayer) for m in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_of_one_variant_is_read_and_of_several_the_plain_one(each_checkpoint: Path, tmp_path: Path) -> None:
    whole, half = AutoPipelineForText2Image.from_pretrained(each_checkpoint), tmp_path / "half"
    whole.save_pretrained(half, variant="fp16")
    for device in ("cpu", "meta"):
        load(half, device=device)
    assert torch.equal(draw(load(half).pipeline), draw(whole))
    other = AutoPipelineForText2Image.from_pretrained(other_pipeline(each_checkpoint, tmp_path / "other"))
    other.save_pretrained(half)
    assert torch.equal(draw(load(half).pipeline), draw(other))
    part = part_of(load(each_checkpoint))
    replaced = tmp_path / "replaced"
    getattr(other, part).save_pretrained(replaced, variant="fp16")
    assert torch.equal(draw(load(each_checkpoint, **{part: str(replaced)}).pipeline), draw(other))


def test_a_part_of_a_denoiser_that_is_not_there_is_seen_without_reading_any(
    each_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(each_checkpoint, tmp_path / "copy")
    pipeline = AutoPipelineForText2Image.from_pretrained(folder)
    denoiser = folder / part_of(load(each_checkpoint))
    (denoiser / "diffusion_pytorch_model.safetensors").unlink()
    getattr(pipeline, denoiser.name).save_pretrained(denoiser, max_shard_size="100KB")
    parts = sorted(denoiser.glob("*.safetensors"))
    assert len(parts) > 1
    load(folder, device="meta")
    parts[-1].unlink()
    with pytest.raises(UserError, match=f"{parts[-1].name}, which the weight index names, is missing"):
        load(folder, device="meta")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_that_is_no_lora_is_told_before_anything_is_trained(
    tiny_checkpoint: Path, tmp_path: Path, device: str
) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"backbone.lora: '.*none.safetensors' cannot be loaded"):
        load(tiny_checkpoint, lora=str(tmp_path / "none.safetensors"), device=device)


@pytest.mark.parametrize("options", [{"checkpoint": "someone/some-model"}, {"lora": "someone/some-model"}])
def test_a_hub_that_cannot_be_reached_is_one_message(tiny_checkpoint: Path, options: dict[str, str]) -> None:
    code = f"""
        from agsm_rl.backbones import load_backbone
        from agsm_rl.errors import UserError
        try:
            load_backbone(**({{"checkpoint": {str(tiny_checkpoint)!r}, "device": "cpu"}} | {options!r}))
        except UserError as error:
            print(error)
    """
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    told = subprocess.run(
        [sys.executable, "-c", dedent(code)], env=os.environ | nowhere, capture_output=True, text=True, check=True
    )
    assert "the hub cannot be reached" in told.stdout


def test_a_lora_that_is_not_there_or_for_another_base_is_told(
    tiny_checkpoint: Path, tiny_xl_checkpoint: Path, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    for options in ({"lora": f"{nowhere}.safetensors"}, {"unet": nowhere}, {"checkpoint": nowhere}):
        with pytest.raises(UserError, match=r"nowhere.*': there is no such file or folder"):
            load(**({"checkpoint": tiny_checkpoint} | options))
    lora = LoRA(rank=2)
    lora.attach(load(tiny_xl_checkpoint))
    (file,) = save_adapters({"lora": lora}, tmp_path, metadata={})
    with pytest.raises(UserError, match=r"backbone.lora: '.*' cannot be loaded"):
        load(tiny_checkpoint, lora=str(file))


def original_file(checkpoint: Path, file: Path) -> Path:
    save_file(in_original_layout(AutoPipelineForText2Image.from_pretrained(checkpoint)), file)
    return file


@pytest.fixture
def published_sd3(tmp_path: Path) -> Path:
    """SD3's folder with a first CLIP whose projection is the identity, as the single file takes for granted."""
    pipeline = make_sd3()
    clip = CLIPTextModelWithProjection(clip_config(pipeline.tokenizer, 32, 32))
    clip.text_projection.weight.data = torch.eye(32)
    pipeline.register_modules(text_encoder=clip, transformer=tiny_transformer(pooled_projection_dim=32 + 24))
    pipeline.save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


@pytest.fixture(params=["tiny_checkpoint", "tiny_xl_checkpoint", "published_sd3"])
def single_file_and_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Each kind's pipeline as a file in the original layout, and as the folder that it was made from."""
    folder = request.getfixturevalue(request.param)
    return original_file(folder, tmp_path / "single.safetensors"), folder


def test_a_single_file_in_the_original_layout_draws_what_its_folder_draws(
    single_file_and_folder: tuple[Path, Path],
) -> None:
    file, folder = single_file_and_folder
    found = load(file, config=str(folder))
    wanted = load(folder)
    assert type(found) is type(wanted) and found.name == wanted.name
    for name, model in wanted.pipeline.components.items():
        if isinstance(model, nn.Module):
            ours, theirs = getattr(found.pipeline, name).state_dict(), model.state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    torch.testing.assert_close(draw(found.pipeline), draw(wanted.pipeline), rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in found.denoiser.parameters())


def test_a_single_file_without_its_configuration_asks_for_it_while_the_hub_may_not_be_asked(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = original_file(tiny_checkpoint, tmp_path / "single.safetensors")
    with pytest.raises(UserError, match="in spite of local_files_only. Set `config:`"):
        load(file, local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set. Set `config:`"):
        load(file)


def test_a_single_file_can_be_drawn_from_and_judged_as_a_folder_can(single_file_and_folder: tuple[Path, Path]) -> None:
    file, folder = single_file_and_folder
    found = open_target(str(file), options={"config": str(folder)})
    assert found.handle is None and found.files == ()
    torch.testing.assert_close(draw(found.backbone.pipeline), draw(load(folder).pipeline), rtol=0, atol=1e-5)


def test_a_single_file_takes_another_denoiser_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = original_file(tiny_checkpoint, tmp_path / "single.safetensors")
    other = other_pipeline(tiny_checkpoint, tmp_path / "other")
    found = load(file, config=str(tiny_checkpoint), unet=str(other))
    assert torch.equal(draw(found.pipeline), draw(load(other).pipeline))


def test_a_single_file_that_cannot_be_used_is_told(tiny_checkpoint: Path, published_sd3: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "model.ckpt"
    torch.save({}, pickled)
    with pytest.raises(UserError, match=r"only .safetensors are read"):
        load(pickled)
    save_file({"down_blocks.0.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"not a complete checkpoint in the original layout.*'down_blocks.0.weight'"):
        load(tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"backbone.config: only a single-file checkpoint"):
        load(tiny_checkpoint, config=str(tiny_checkpoint))
    # As SD3 is also published: the transformer and the VAE alone.
    whole = in_original_layout(StableDiffusion3Pipeline.from_pretrained(published_sd3))
    bare = {name: tensor for name, tensor in whole.items() if not name.startswith("text_encoders.")}
    save_file(bare, tmp_path / "bare.safetensors")
    shutil.copytree(published_sd3, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"bare.safetensors' cannot be loaded: .*model.safetensors"):
        load(tmp_path / "bare.safetensors", config=str(tmp_path / "config"))
    found = load(tmp_path / "bare.safetensors", config=str(published_sd3))  # whose folder has the text encoders
    torch.testing.assert_close(draw(found.pipeline), draw(load(published_sd3).pipeline), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("backbone.checkpoint", {"checkpoint": "someone/some-model"}),
        ("backbone.unet", {"unet": "someone/some-model"}),
        ("backbone.lora", {"lora": "someone/some-model"}),
    ],
)
def test_a_hub_id_that_is_not_in_the_cache_is_one_message_while_the_hub_may_not_be_asked(
    place: str, options: dict[str, str], tiny_checkpoint: Path
) -> None:
    with pytest.raises(UserError) as told:
        load(**({"checkpoint": tiny_checkpoint, "local_files_only": True} | options))
    message = str(told.value)
    assert message.startswith(f"{place}: 'someone/some-model' cannot be loaded: ")
    assert "in the hub's cache here" in message and "local_files_only" in message and "HF_HUB_OFFLINE" in message
    assert len(message.splitlines()) == 2


def test_sd3_5_s_transformer_trains_as_sd3_s_does(tiny_sd3_checkpoint: Path, tmp_path: Path, make_pairs) -> None:
    """Dual attention in its first layers, and queries and keys that are normalised."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_checkpoint)
    pipeline.register_modules(transformer=tiny_transformer(dual_attention_layers=(0, 1), qk_norm="rms_norm"))
    pipeline.save_pretrained(tmp_path)
    backbone = load(tmp_path)
    assert isinstance(backbone, StableDiffusion3) and backbone.denoiser.transformer_blocks[0].use_dual_attention
    base = draw(backbone.pipeline)
    policy = Policy(backbone, {"tokens": SoftTokens(layers=3), "lora": LoRA(rank=2, banks=2, text_encoders=True)})
    loss, _ = AGSM().loss(policy, _bound(make_pairs()).next(policy))
    parameters = policy.parameters()
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))
    assert all(found["tokens.soft_tokens"][bank, layer].any() for bank in (0, 1) for layer in range(3))
    second = [name for name in found if name.startswith("lora.positive.transformer_blocks.0.attn2.")]
    assert second and all(found[name].any() for name in second if name.endswith("lora_B"))
    with policy.switched_off():
        assert torch.equal(draw(backbone.pipeline), base)


def _bound(source: Any) -> Any:
    class OneProcess:
        index, count = 0, 1

        def gather(self, values: torch.Tensor) -> torch.Tensor:
            return values

    source.bind("agsm", 0, OneProcess())
    return source


def test_a_v_prediction_folder_is_one_by_its_scheduler_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "v"))
    DDIMScheduler.from_pretrained(folder / "scheduler", prediction_type="v_prediction").save_pretrained(
        folder / "scheduler"
    )
    backbone = load(folder)
    x0, noise, t = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0), torch.tensor([0.5])
    assert not torch.allclose(backbone.target(x0, noise, t), noise)
    # v leads back to the image from where the noise has led: x0 = a x_t - s v, a² + s² = 1.
    x_t, v = backbone.add_noise(x0, noise, t), backbone.target(x0, noise, t)
    a = ((2 * v + x_t) / 5)[0, 0, 0, 0]  # v = 2a - s and x_t = a + 2s
    torch.testing.assert_close(a * x_t - (1 - a**2).sqrt() * v, x0)


def test_a_broken_package_is_named_where_its_kind_may_be_the_one_that_is_missing(monkeypatch):
    entries = registry.available("backbones") | {"mine": registry.Entry("mine", "no_such_module:Mine", "my-package")}
    monkeypatch.setattr(registry, "available", lambda kind: entries)
    message = str(unsupported("backbone.checkpoint: 'x'", "MinePipeline"))
    assert "is a MinePipeline; supported: StableDiffusionPipeline" in message
    assert "Not looked at: backbone 'mine'" in message and "no_such_module" in message

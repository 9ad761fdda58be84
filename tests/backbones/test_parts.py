"""A base is what its files say: nothing is drawn at random, dropped, unpickled, imported or guessed as it loads."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from original_layout import in_original_layout
from safetensors.torch import load_file, save_file

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError

DENOISER = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer"}


@pytest.fixture
def copy(each_checkpoint: Path, tmp_path: Path) -> Path:
    """A pipeline folder of each kind that a test may spoil."""
    return Path(shutil.copytree(each_checkpoint, tmp_path / "base"))


def denoiser_of(folder: Path) -> str:
    return "unet" if (folder / "unet").is_dir() else "transformer"


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        load_backbone(str(folder), **({"device": "cpu"} | options))
    return str(refused.value)


@pytest.mark.parametrize("part", ["text_encoder", "denoiser", "vae"])
def test_a_part_whose_file_lacks_a_weight_is_refused_by_name(copy: Path, part: str) -> None:
    part = denoiser_of(copy) if part == "denoiser" else part
    lost = []
    change_weights(copy / part, lambda tensors: lost.append(min(tensors)) or tensors.pop(min(tensors)))
    assert f"its {part} lacks 1 weight, first '{lost[0]}'" in refusal(copy)


@pytest.mark.parametrize("part", ["text_encoder", "denoiser", "vae"])
def test_a_tensor_that_a_part_has_no_place_for_is_refused_by_name(copy: Path, part: str) -> None:
    part = denoiser_of(copy) if part == "denoiser" else part
    change_weights(copy / part, lambda tensors: tensors.update(strange=torch.zeros(1)))
    assert f"its {part} has no place for 1 tensor, first 'strange'" in refusal(copy)


def test_a_pipeline_that_was_saved_with_an_unfused_lora_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
    adapter = LoRA(rank=2)
    backbone = load_backbone(str(tiny_checkpoint), device="cpu")
    adapter.attach(backbone)
    save_file(adapter.export()[0], tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    pipeline.save_pretrained(tmp_path / "base")
    assert "its unet lacks" in refusal(tmp_path / "base")


def test_a_replacing_denoiser_must_be_whole_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_checkpoint / "unet", tmp_path / "unet"))
    change_weights(other, lambda tensors: tensors.pop("conv_in.bias"))
    assert "backbone.unet: " in (told := refusal(tiny_checkpoint, unet=str(other))) and "'conv_in.bias'" in told


@pytest.mark.parametrize("name", ["input_blocks.0.0.bias", "time_embed.0.bias", "input_blocks.1.0.in_layers.2.weight"])
def test_a_single_file_that_lacks_a_weight_is_refused(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    tensors = in_original_layout(StableDiffusionPipeline.from_pretrained(tiny_checkpoint))
    tensors.pop(f"model.diffusion_model.{name}")
    save_file(tensors, tmp_path / "model.safetensors")
    told = refusal(tmp_path / "model.safetensors", config=str(tiny_checkpoint))
    assert "its unet lacks 1 weight, first '" in told


@pytest.mark.parametrize("part", ["text_encoder", "denoiser"])
def test_a_weight_index_that_names_a_pickle_is_refused_and_the_pickle_not_read(copy: Path, part: str) -> None:
    part = denoiser_of(copy) if part == "denoiser" else part
    file = next((copy / part).glob("*.safetensors"))
    torch.save(load_file(file), copy / part / "weights.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(file), "weights.bin")}
    (copy / part / f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()
    assert "weights.bin" in (told := refusal(copy)) and "safetensors" in told


@pytest.mark.parametrize(
    ("file", "named"), [("tokenizer_config.json", "model_max_length"), ("tokenizer.json", "knows 2 tokens")]
)
def test_a_tokenizer_without_one_of_its_files_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, file: str, named: str
) -> None:
    folder = Path(shutil.copytree("agsm_rl/shapes/checkpoints/shapes-sd15", tmp_path / "base"))
    (folder / "tokenizer" / file).unlink()
    assert named in (told := refusal(folder)) and f"tokenizer/{file}" in told


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        ("denoiser", {"block_out_channels": [-1, -1]}, "cannot be loaded"),
        ("text_encoder", {"_attn_implementation": "someone/kernel:fn"}, "someone/kernel:fn"),
        ("denoiser", {"quantization_config": {"quant_method": "torchao", "quant_type": "x"}}, "quantization_config"),
        ("text_encoder", {"quantization_config": {"quant_method": "quark"}}, "quantization_config"),
        ("text_encoder", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("vae", {"latent_channels": "four"}, "cannot be loaded"),
    ],
)
def test_a_strange_configuration_is_one_message(
    tiny_checkpoint: Path, tmp_path: Path, part: str, values: dict[str, Any], named: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    part = denoiser_of(folder) if part == "denoiser" else part
    change_json(folder / part / "config.json", **values)
    assert named in refusal(folder)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor 0"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor nan"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor 'x'"),
        ("vae/config.json", {"shift_factor": float("inf")}, "shift_factor inf"),
        ("scheduler/scheduler_config.json", {"beta_end": float("nan")}, "betas that are not finite"),
    ],
)
def test_a_number_that_makes_every_picture_noise_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, file: str, values: dict[str, Any], named: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    change_json(folder / file, **values)
    assert named in refusal(folder)


def test_a_configuration_nested_beyond_reason_is_one_message(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    (folder / "unet" / "config.json").write_text("[" * 100_000)
    assert "cannot be loaded" in refusal(folder)


def test_a_single_file_says_itself_that_it_predicts_v(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = in_original_layout(StableDiffusionPipeline.from_pretrained(tiny_checkpoint))
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "model.safetensors")
    backbone = load_backbone(str(tmp_path / "model.safetensors"), device="cpu", config=str(tiny_checkpoint))
    config = backbone.pipeline.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    x0, noise, t = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0), torch.tensor([0.5])
    assert not torch.allclose(backbone.target(x0, noise, t), noise)


def test_a_noise_prediction_with_zero_terminal_snr_is_refused_when_it_is_loaded(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    change_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    assert "zero terminal SNR" in refusal(folder)


def test_a_whole_base_loads_as_diffusers_loads_it(each_checkpoint: Path) -> None:
    ours = load_backbone(str(each_checkpoint), device="cpu").pipeline
    theirs = DiffusionPipeline.from_pretrained(str(each_checkpoint))
    assert set(ours.components) == set(theirs.components)
    for name, part in theirs.components.items():
        if isinstance(part, torch.nn.Module):
            mine = ours.components[name].state_dict()
            assert all(torch.equal(tensor, mine[key]) for key, tensor in part.state_dict().items())


@pytest.mark.parametrize("name", ["unet/config.json", "text_encoder/model.safetensors", "vae/more.safetensors"])
def test_a_named_pipe_among_a_base_s_files_is_refused_and_not_waited_for(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is not a regular file" in refusal(folder)


def indexed(folder: Path, content: Any) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))


INDEX = "model_index.json"
PART = "must be [library, class]"
SHARD = "the weight index of its unet names"
ODD = {
    "a text in place of a part": (
        lambda at: change_json(at / INDEX, vae="x"),
        ["its vae is 'x' in model_index.json", PART],
    ),
    "a number in place of a part": (lambda at: change_json(at / INDEX, unet=1), ["its unet is 1", PART]),
    "an object in place of a part": (lambda at: change_json(at / INDEX, tokenizer={}), ["its tokenizer is {}", PART]),
    "three words in place of a part": (
        lambda at: change_json(at / INDEX, vae=["diffusers", "AutoencoderKL", "x"]),
        [PART],
    ),
    "half of a part": (lambda at: change_json(at / INDEX, vae=["diffusers", None]), [PART]),
    "a part that is null": (lambda at: change_json(at / INDEX, vae=[None, None]), ["model_index.json names no vae"]),
    "no encoder": (lambda at: change_json(at / INDEX, text_encoder=None), ["model_index.json names no text_encoder"]),
    "an index that is a list": (
        lambda at: (at / INDEX).write_text("[1]"),
        ["its model_index.json holds [1]", "object"],
    ),
    "an index that is null": (lambda at: (at / INDEX).write_text("null"), ["its model_index.json holds null"]),
    "a configuration that is a list": (
        lambda at: (at / "unet/config.json").write_text("[1]"),
        ["unet/config.json", "[1]"],
    ),
    "a scheduler's that is a list": (
        lambda at: (at / "scheduler/scheduler_config.json").write_text("[1]"),
        ["scheduler/scheduler_config.json holds [1]"],
    ),
    "a configuration in Latin-1": (
        lambda at: (at / "vae/config.json").write_bytes(b'{"a": "\xff"}'),
        ["its vae cannot be loaded", "vae/config.json", "UTF-8"],
    ),
    "a T5's tokenizer on a CLIP": (
        lambda at: change_json(at / INDEX, tokenizer=["transformers", "T5Tokenizer"]),
        ["its tokenizer (T5Tokenizer) cannot be loaded from its files", "another class"],
    ),
    "a schedule without timesteps": (
        lambda at: change_json(at / "scheduler/scheduler_config.json", num_train_timesteps=0),
        ["its scheduler (DDIMScheduler) cannot be loaded"],
    ),
    "a shard in another folder": (
        lambda at: indexed(at, {"weight_map": {"a": "../x.safetensors"}}),
        [SHARD, "'../x.safetensors'", "another folder"],
    ),
    "a shard anywhere": (lambda at: indexed(at, {"weight_map": {"a": "/x.safetensors"}}), [SHARD, "absolute path"]),
    "a pickled shard": (lambda at: indexed(at, {"weight_map": {"a": "x.bin"}}), [SHARD, "pickled"]),
    "a shard that is a number": (lambda at: indexed(at, {"weight_map": {"a": 1}}), ["has no weight_map"]),
    "no map of shards": (lambda at: indexed(at, [1]), ["has no weight_map"]),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_of_a_base_is_named_with_what_it_holds(tiny_checkpoint: Path, tmp_path: Path, case: str) -> None:
    damage, words = ODD[case]
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    damage(folder)
    message = refusal(folder)
    assert "base" in message
    for word in words:
        assert word in message


def test_a_scheduler_of_another_kind_of_diffusion_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    change_json(folder / INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert "its scheduler is a FlowMatchEulerDiscreteScheduler" in refusal(folder)


def test_clip_encoders_whose_keys_begin_with_text_model_load(each_checkpoint: Path, tmp_path: Path) -> None:
    """So are those on the hub, from older versions of transformers."""
    folder = Path(shutil.copytree(each_checkpoint, tmp_path / "base"))
    for file in folder.glob("text_encoder*/model.safetensors"):
        tensors = load_file(file)
        if any(name.startswith("embeddings.") for name in tensors):
            renamed = {name if name.startswith("text_") else f"text_model.{name}": tensors[name] for name in tensors}
            save_file(renamed, file, {"format": "pt"})
    names = load_file(folder / "text_encoder/model.safetensors")
    assert any(name.startswith("text_model.embeddings.") for name in names)
    prompts = ["a red star", "two blue circles"]
    before, after = (load_backbone(str(at), device="cpu").encode_text(prompts) for at in (each_checkpoint, folder))
    assert torch.equal(before.embeds, after.embeds)

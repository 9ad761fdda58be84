"""Strangers' weights: bases, adapters and checkpoints of another shape, with NaN inside, damaged, or pickled."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import assert_refused
from safetensors.torch import load_file, save_file

from agsm_rl.run import checkpoints

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def changed_config(base: Path, part: str, **values: Any) -> None:
    file = base / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_nan(file: Path, name: str | None = None) -> None:
    tensors = load_file(file)
    name = name or next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = float("nan")
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    save_file(tensors, file, metadata)


def pickled(base: Path) -> None:
    """The same weights as a pickle, which could run code."""
    tensors = load_file(base / UNET)
    (base / UNET).unlink()
    torch.save(tensors, (base / UNET).with_suffix(".bin"))


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


BASES = {
    "weights that are gone": (lambda base: (base / UNET).unlink(), ["cannot be loaded"]),
    "weights that are truncated": (lambda base: truncated(base / UNET), ["cannot be loaded"]),
    "pickled weights": (pickled, ["cannot be loaded"]),
    "NaN in the U-Net": (lambda base: with_nan(base / UNET), ["unet", "not finite"]),
    "NaN in the autoencoder": (
        lambda base: with_nan(base / "vae" / "diffusion_pytorch_model.safetensors"),
        ["vae", "not finite"],
    ),
    "a text encoder of another width": (
        lambda base: _other_text_encoder(base),
        ["text", "48", "32"],
    ),
    "a pipeline of another kind": (
        lambda base: (base / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}'),
        ["PixArtAlphaPipeline", "supported", "StableDiffusionPipeline"],
    ),
    "an index that is no JSON": (lambda base: (base / "model_index.json").write_text("{"), ["cannot be loaded"]),
    "no index": (lambda base: (base / "model_index.json").unlink(), ["model_index.json"]),
    "a config that does not fit the weights": (
        lambda base: changed_config(base, "unet", block_out_channels=[32, 32]),
        ["cannot be loaded"],
    ),
    "a VAE of other channels": (lambda base: changed_config(base, "unet", in_channels=9), ["cannot be loaded"]),
}


def _other_text_encoder(base: Path) -> None:
    from tiny_pipelines import clip_config
    from transformers import CLIPTextModel

    from agsm_rl.shapes.train_base.text import make_tokenizer

    CLIPTextModel(clip_config(make_tokenizer(), width=48)).save_pretrained(base / "text_encoder")


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_be_used_is_refused(train, content, tmp_path, tiny_checkpoint, case):
    damage, words = BASES[case]
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    damage(base)
    content["backbone"]["checkpoint"] = str(base)
    assert_refused(train(content), "backbone.checkpoint", *words, folder=tmp_path / "run")


def test_a_pickled_single_file_is_refused(train, content, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    content["backbone"]["checkpoint"] = "model.ckpt"
    assert_refused(train(content), "model.ckpt", "only .safetensors", folder=tmp_path / "run")


@pytest.fixture
def trained(train, content, tmp_path) -> Path:
    """A run of two steps, moved to `first`."""
    assert train(content).exit_code == 0
    return (tmp_path / "run").rename(tmp_path / "first")


def lora_file(run: Path) -> Path:
    return run / "adapter" / "pytorch_lora_weights.safetensors"


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("ran", "w"))


ADAPTERS = {
    "NaN inside": (lambda run: with_nan(lora_file(run)), {}, ["not finite", "lora_A"]),
    "truncated": (lambda run: truncated(lora_file(run)), {}, ["truncated or not safetensors"]),
    "a pickle": (lambda run: lora_file(run).write_bytes(pickle.dumps(Trap())), {}, ["not safetensors"]),
    "not ours": (
        lambda run: save_file({"x": torch.zeros(1)}, lora_file(run)),
        {},
        ["not exported by agsm-rl", "load_lora_weights"],
    ),
    "another rank": (lambda run: None, {"lora": {"use": "lora", "rank": 3}}, ["rank"]),
    "another kind": (lambda run: None, {"lora": {"use": "soft_tokens"}}, ["lora", "soft_tokens"]),
    "another name": (lambda run: None, {"mine": {"use": "lora", "rank": 2}}, ["'mine'", "lora"]),
    "no adapter at all": (lambda run: shutil.rmtree(run / "adapter"), {}, [".safetensors"]),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_do_not_fit_are_refused_as_a_start(train, trained, content, tmp_path, case):
    damage, adapters, words = ADAPTERS[case]
    damage(trained)
    content |= {"start_from": str(trained)} | ({"adapters": adapters} if adapters else {})
    assert_refused(train(content), "start_from", *words, folder=tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", [case for case, (_, adapters, _) in ADAPTERS.items() if not adapters])
def test_adapters_that_are_damaged_are_refused_for_drawing(command, trained, tmp_path, case):
    damage, _, words = ADAPTERS[case]
    damage(trained)
    assert_refused(command("sample", trained, "a red star", "-o", "out"), *words, folder=tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_adapters_of_another_base_are_refused(command, trained, tmp_path, tiny_xl_checkpoint):
    result = command("sample", trained, "a red star", "-o", "out", "--base", tiny_xl_checkpoint)
    assert_refused(result, "LoRA", "another base", folder=tmp_path / "out")


def resealed(run: Path, data: bytes) -> None:
    """Put other content into the checkpoint, and its checksum beside it, as an attacker would."""
    (path,) = (run / "checkpoints").glob("*.pt")
    path.write_bytes(data)
    path.with_suffix(".sha256").write_text(checkpoints._digest(path))


def rewritten(run: Path, change: Any) -> None:
    (path,) = (run / "checkpoints").glob("*.pt")
    state = torch.load(path, weights_only=True)
    torch.save(change(state), path)
    path.with_suffix(".sha256").write_text(checkpoints._digest(path))


def _nan(state: Any) -> Any:
    next(iter(state["policy"]["live"].values())).view(-1)[0] = float("nan")
    return state


def _wider(state: Any) -> Any:
    live = state["policy"]["live"]
    name = next(iter(live))
    live[name] = torch.zeros(5, 5)
    return state


def _without(key: str) -> Any:
    return lambda state: {name: value for name, value in state.items() if name != key}


CHECKPOINTS = {
    "a pickle with its checksum": (
        lambda run: resealed(run, pickle.dumps(Trap())),
        ["not a checkpoint of this"],
    ),
    "a text with its checksum": (lambda run: resealed(run, b"nothing"), ["not a checkpoint of this"]),
    "NaN inside": (lambda run: rewritten(run, _nan), ["not finite"]),
    "another width": (lambda run: rewritten(run, _wider), ["shape (5, 5)"]),
    "a list": (lambda run: rewritten(run, lambda state: [1]), ["not a checkpoint of this"]),
    "no optimiser": (
        lambda run: rewritten(run, _without("optimizer")),
        ["does not belong to this", "optimizer"],
    ),
    "no sources": (lambda run: rewritten(run, _without("sources")), ["does not belong to this", "sources"]),
    "truncated": (lambda run: truncated(next((run / "checkpoints").glob("*.pt"))), ["no good checkpoint is left"]),
    "vanished": (lambda run: shutil.rmtree(run / "checkpoints"), ["checkpoints are gone", "start_from"]),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used_is_never_a_silent_restart(command, trained, tmp_path, case):
    damage, words = CHECKPOINTS[case]
    damage(trained)
    before = (trained / "metrics.jsonl").read_text()
    result = command("train", trained / "recipe.yaml", "--resume", "--set", "steps=3")
    assert_refused(result, "first", *words)
    assert (trained / "metrics.jsonl").read_text() == before
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_published_tokens_is_not_run(command, tmp_path):
    (tmp_path / "soft_tokens.pth").write_bytes(pickle.dumps(Trap()))
    assert_refused(command("convert", "soft_tokens.pth", "out.safetensors"), "soft_tokens.pth")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()

"""A TRL script runs on every kind of base."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from agsm_rl.compat.trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from agsm_rl.errors import UserError


def test_a_script_runs_on_every_kind_of_base(each_checkpoint, tmp_path):
    config = DDPOConfig(
        num_epochs=2, sample_num_steps=3, sample_batch_size=2, mixed_precision="no", logdir=str(tmp_path)
    )
    config.train_learning_rate = 0.1
    pipeline = DefaultDDPOStableDiffusionPipeline(str(each_checkpoint))
    trainer = DDPOTrainer(
        config, lambda images, *_: (images.mean(dim=(1, 2, 3)), {}), lambda: ("a red star", {}), pipeline
    )
    figures = []
    run_step = trainer._trainer.run_step
    trainer._trainer.run_step = lambda: figures.append(run_step()) or figures[-1]
    trainer.train()
    assert figures[0]["trl/ratio_deviation"] < 1e-5
    trainer.save_pretrained(tmp_path / "result")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "result")
    plain.load_lora_weights(tmp_path / "result")
    drawn = [
        pipe("a red star", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        for pipe in (plain, pipeline.sd_pipeline)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def trl_refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        DefaultDDPOStableDiffusionPipeline(str(folder))
    return str(refused.value)


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_a_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file, {"format": "pt"})


def with_nan(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, file, {"format": "pt"})


UNSOUND = {
    "code of its own": (lambda at: change_json(at / "unet/config.json", auto_map={"A": "b"}), ["unet", "auto_map"]),
    "a kernel": (lambda at: change_json(at / "text_encoder/config.json", _attn_implementation="a/b"), ["kernel"]),
    "missing weights": (lambda at: without_a_weight(at / "vae/diffusion_pytorch_model.safetensors"), ["vae lacks 1"]),
    "NaN": (lambda at: with_nan(at / "vae/diffusion_pytorch_model.safetensors"), ["vae", "not finite"]),
    "an odd scale": (lambda at: change_json(at / "vae/config.json", scaling_factor=0), ["scaling_factor 0"]),
    "an index that is a list": (lambda at: (at / "model_index.json").write_text("[]"), ["model_index.json holds []"]),
    "a pipe": (lambda at: os.mkfifo(at / "unet" / "x.safetensors"), ["unet/x.safetensors is not a regular file"]),
    "half a tokenizer": (
        lambda at: (at / "tokenizer/tokenizer_config.json").unlink(),
        ["tokenizer has model_max_length", "text_encoder reads 20"],
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_a_trl_base_passes_the_checks_of_a_recipe_s(tiny_checkpoint, tmp_path, case):
    damage, words = UNSOUND[case]
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    damage(folder)
    message = trl_refusal(folder)
    for word in ("pretrained_model_name", *words):
        assert word in message

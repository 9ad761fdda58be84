"""A TRL script on two processes, as torchrun starts it."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SCRIPT = """
import random, sys
from pathlib import Path

import torch

from agsm_rl.compat.trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

checkpoint, folder = sys.argv[1], Path(sys.argv[2])
config = DDPOConfig(
    num_epochs=2, sample_num_steps=3, sample_batch_size=2, sample_num_batches_per_epoch=2, train_batch_size=2,
    mixed_precision="no", per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=2,
    accelerator_kwargs={"cpu": True}, logdir=str(folder),
)
trainer = DDPOTrainer(
    config,
    lambda images, prompts, metadata: (images.mean(dim=(1, 2, 3)), {}),
    lambda: (random.choice(["a red star", "a blue circle"]), {}),
    DefaultDDPOStableDiffusionPipeline(checkpoint),
)
trainer.train()
index = trainer.accelerator.process_index
torch.save({name: value.detach() for name, value in trainer.policy.parameters().items()}, folder / f"{index}.pt")
torch.save(trainer._rollouts.batch.trajectory[:, 0], folder / f"noise-{index}.pt")
torch.save({prompt: len(past) for prompt, past in trainer._rollouts.histories.items()}, folder / f"counts-{index}.pt")
trainer.save_pretrained(folder / "result")
"""


def test_two_processes_draw_their_own_images_and_learn_the_same(tiny_checkpoint, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # `accelerate launch --cpu --num_processes 2` starts one process only; torchrun starts two.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, str(script), str(tiny_checkpoint), str(tmp_path)], check=True, timeout=600)
    first, second = (torch.load(tmp_path / f"{index}.pt") for index in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    counts = [torch.load(tmp_path / f"counts-{index}.pt") for index in (0, 1)]
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == 16  # two epochs of four images on each of two processes
    noise = [torch.load(tmp_path / f"noise-{index}.pt") for index in (0, 1)]
    assert not torch.equal(*noise)
    assert (tmp_path / "checkpoints" / "checkpoint_1" / "pytorch_lora_weights.safetensors").is_file()
    saved = load_file(tmp_path / "result" / "pytorch_lora_weights.safetensors")
    trained = {name.removeprefix("lora.positive."): value for name, value in first.items()}
    assert all(torch.equal(saved[f"unet.{name}.weight"], value) for name, value in trained.items())

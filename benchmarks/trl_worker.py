# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "trl==0.11.4",
#     "accelerate==1.15.0",
#     "datasets==5.2.0",
#     "diffusers==0.42.1",
#     "peft==0.21.2",
#     "torch==2.13.0",
#     "transformers==5.23.0",
# ]
# ///
"""TRL's DDPOTrainer as a worker of ddpo_step.py, in its own environment (the lock beside this file).

    python benchmarks/trl_worker.py '{"checkpoint": …, "prompts": […], …}'     the settings come from ddpo_step.py

A step is one of TRL's epochs: draw all images, score them, and learn from all of them.
"""

import itertools
import json
import sys
import tempfile
import warnings
from typing import Any

import measure
import torch
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


def brightness(images: torch.Tensor, prompts: tuple[str, ...], metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mean of all pixels."""
    return images.float().mean(dim=(1, 2, 3)), {}


def make_trainer(settings: dict[str, Any]) -> DDPOTrainer:
    """TRL's trainer with one optimiser step per epoch, whatever the batch sizes."""
    prompts, count = itertools.cycle(settings["prompts"]), len(settings["prompts"])
    config = DDPOConfig(
        mixed_precision="fp16" if settings["device"] == "cuda" else "no",
        accelerator_kwargs={"cpu": settings["device"] == "cpu"},
        project_kwargs={"project_dir": tempfile.mkdtemp()},
        save_freq=10**9,
        sample_num_steps=settings["num_steps"],
        sample_guidance_scale=settings["guidance"],
        sample_batch_size=settings["sample_batch_size"],
        sample_num_batches_per_epoch=count // settings["sample_batch_size"],
        train_batch_size=settings["train_batch_size"],
        train_gradient_accumulation_steps=count // settings["train_batch_size"],
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(settings["checkpoint"])
    trainer = DDPOTrainer(config, brightness, lambda: (next(prompts), {}), pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    return trainer


def main() -> None:
    """Run epochs on request."""
    warnings.filterwarnings("ignore")
    settings = json.loads(sys.argv[1])
    trainers: list[DDPOTrainer] = []

    def step() -> None:
        if not trainers:
            trainers.append(make_trainer(settings))
        trainers[0].step(0, 0)

    measure.serve(step, settings["device"])


if __name__ == "__main__":
    main()

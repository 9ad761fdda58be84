"""A few AGSM steps on real photographs through a randomly initialised Stable Diffusion 1.5 of full width, at 512 px.

    python examples/photographs.py photos && python benchmarks/full_width.py photos

It shows that nothing depends on the embedded base's small sizes, and what a step costs; the figures are
written to benchmarks/results/full_width.json. The weights are random, so no picture is to be expected.
"""

import json
import platform
import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.shapes.train_base.layouts import assemble_sd15
from agsm_rl.shapes.train_base.text import make_tokenizer
from agsm_rl.sources.pairs import Pairs

RESULTS = Path(__file__).parent / "results" / "full_width.json"


def make_pipeline() -> StableDiffusionPipeline:
    """SD1.5's published configuration (diffusers' defaults are its sizes), random weights, a small vocabulary."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    end = tokenizer.eos_token_id
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return assemble_sd15(vae, CLIPTextModel(text), tokenizer=tokenizer, unet=unet)


def main(
    photos: Path,
    steps: Annotated[int, typer.Option(min=1)] = 2,
    batch_size: Annotated[int, typer.Option(min=2)] = 2,
) -> None:
    """Train soft tokens for a few steps and record seconds a step and the peak of resident memory."""
    backbone = StableDiffusion.from_pipeline(make_pipeline(), gradient_checkpointing=True)
    policy = Policy(backbone, {"tokens": SoftTokens(num_tokens=4)})
    term = Term(AGSM(group_size=2), Pairs(str(photos), batch_size), name="agsm")
    trainer = Trainer(policy, [term], steps=steps)
    seconds = []
    while trainer.step < steps:
        began = time.perf_counter()
        metrics = trainer.run_step()
        seconds.append(round(time.perf_counter() - began, 1))
        print(trainer.step, seconds[-1], "s", metrics, flush=True)
    figures = {
        "what": f"AGSM, random SD1.5, 512 px, {batch_size} images x 2 prompts, gradient checkpointing, float32",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads",
        "denoiser_parameters": sum(parameter.numel() for parameter in backbone.denoiser.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in policy.parameters().values()),
        "seconds_a_step": seconds,
        "peak_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "last_step": {key: round(value, 5) for key, value in metrics.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)

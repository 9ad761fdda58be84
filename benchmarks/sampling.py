"""Sampling with attached soft tokens, compared with the bare diffusers pipeline.

    python benchmarks/sampling.py [--size embedded | sd15] [--device cpu | cuda]

The same pipeline object draws the same prompts from the same noise, with and without `agsm_rl.attach`; attaching and
detaching are not timed.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import measure
import torch
import typer
from bases import Size, make_pipeline, resolution_of

import agsm_rl
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import backbone_of
from agsm_rl.export.attach import save_adapters
from agsm_rl.sources.prompt_lists import read_prompts


def export_tokens(pipeline: Any, folder: Path, num_tokens: int) -> None:
    """Write untrained soft tokens for this pipeline; their values do not affect the time."""
    tokens = SoftTokens(num_tokens=num_tokens)
    tokens.attach(backbone_of(pipeline))
    save_adapters({"tokens": tokens}, folder, metadata={})
    tokens.detach()


def main(
    size: Size = "embedded",
    device: Literal["cpu", "cuda"] = "cpu",
    images: Annotated[int, typer.Option(min=1)] = 8,
    num_steps: Annotated[int, typer.Option(min=1)] = 30,
    guidance: float = 7.0,
    num_tokens: Annotated[int, typer.Option(min=1)] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 25,
    warmup: Annotated[int, typer.Option(min=0)] = 2,
    results: Path = measure.RESULTS,
) -> None:
    """Measure and record."""
    pipeline = make_pipeline(size, device)
    if device == "cuda":
        pipeline.to(torch.bfloat16)
    prompts = list(dict.fromkeys(prompt.text for prompt in read_prompts("builtin:shapes-prompts")))[:images]
    side = resolution_of(size, device)
    options = {"height": side, "width": side, "num_inference_steps": num_steps, "guidance_scale": guidance}

    def draw() -> None:
        generator = torch.Generator(device).manual_seed(0)
        pipeline(prompts, generator=generator, output_type="pt", **options)

    with tempfile.TemporaryDirectory() as folder:
        export_tokens(pipeline, Path(folder), num_tokens)

        def with_tokens() -> measure.Seconds:
            handle = agsm_rl.attach(pipeline, folder)
            try:
                return measure.timed(draw, device)()
            finally:
                handle.detach()

        sides = {"tokens": with_tokens, "bare": measure.timed(draw, device)}
        taken = measure.interleave(sides, repeats=repeats, warmup=warmup)
    measure.write_result(
        f"sampling_{size}_{device}",
        what=f"{images} images, {num_steps} steps, guidance {guidance:g}, {num_tokens} soft tokens",
        device=device,
        results=results,
        comparisons={"sampling": measure.compare_seconds(taken["tokens"], taken["bare"], of="ours/other")},
    )


if __name__ == "__main__":
    typer.run(main)

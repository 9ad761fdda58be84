"""One AGSM step and one DDPO draw and update at a published model's real size, with random weights.

    python benchmarks/full_size.py sd15 | sdxl | sd3 [--resolution 512] [--dtype bfloat16] [--device cuda]

It shows that nothing depends on the small sizes of the embedded bases, and what a step costs in seconds and memory. The
figures go to benchmarks/results/full_size_<kind>_<device>.json. Weights are random, so do not expect pictures.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import typer
from agsm_rl_rewards.brightness import Brightness
from full_size_models import MAKERS
from measure import resident_bytes, write_result

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import backbone_of
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.policy import Objective, Source
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.rollouts import Rollouts


class Meter:
    """Measures seconds and peak memory."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")

    def run(self, what: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """Run `what` once and measure it; on a CPU, the peak is the process's since its start, weights included."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        metrics = what()
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        bytes_ = torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes(peak=True)
        figures = {key: round(value, 6) for key, value in metrics.items() if "/" in key}
        return {"seconds": round(seconds, 2), "peak_gib": round(bytes_ / 2**30, 2), "metrics": figures}


def main(
    kind: Annotated[Literal["sd15", "sdxl", "sd3"], typer.Argument()],
    resolution: Annotated[int | None, typer.Option(help="default: the model's own")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="type of the frozen weights")] = "float32",
    device: str = "cpu",
    batch_size: Annotated[int, typer.Option(min=2, help="images for AGSM, with two prompts each")] = 2,
    images: Annotated[int, typer.Option(min=2, help="images per draw for DDPO")] = 2,
    num_steps: Annotated[int, typer.Option(min=1, help="sampling steps for DDPO")] = 2,
) -> None:
    """Run both and record what they cost."""
    torch.manual_seed(0)
    pipeline = MAKERS[kind]().to(device)
    if dtype != "float32":
        pipeline.to(getattr(torch, dtype))
    backbone = backbone_of(pipeline, resolution=resolution, gradient_checkpointing=True)
    policy = Policy(backbone, {"tokens": SoftTokens(num_tokens=4)})
    flow = kind == "sd3"
    drawn = Rollouts(
        "builtin:shapes-prompts", [(Brightness(), 1.0)], num_prompts=images // 2, images_per_prompt=2,
        num_steps=num_steps, guidance=1.0, advantages="group", sample_batch_size=1,
    )  # fmt: skip
    learned: dict[str, tuple[Objective, Source]] = {
        "agsm": (AGSM(group_size=2), Pairs("builtin:shapes", batch_size, num_images=8)),
        "flow_grpo" if flow else "ddpo": (FlowGRPO() if flow else DDPO(), drawn),
    }
    meter, steps = Meter(device), {}
    for name, (objective, source) in learned.items():
        trainer = Trainer(policy, [Term(objective, source, name=name)], steps=1)
        steps[name] = meter.run(trainer.run_step)
        print(name, steps[name], flush=True)
        # Write after each, so that its figures survive if the next one, which takes minutes on a CPU, is interrupted.
        write_result(
            f"full_size_{kind}_{device.partition(':')[0]}",
            what=f"random {kind} at full size, {backbone.resolution} px, {dtype}, gradient checkpointing, 4 tokens; "
            f"AGSM: {batch_size} images x 2 prompts; policy gradient: {images} images x {num_steps} sampling steps",
            device=device,
            denoiser_parameters=sum(parameter.numel() for parameter in backbone.denoiser.parameters()),
            trained_parameters=sum(parameter.numel() for parameter in policy.parameters().values()),
            latents=list(backbone.latent_shape),
            steps=steps,
        )


if __name__ == "__main__":
    typer.run(main)

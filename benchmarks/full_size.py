"""One step of AGSM, a policy gradient and DiffusionNFT at a published model's real size, with random weights.

    python benchmarks/full_size.py sd15 | sdxl | sd3 [--resolution 512] [--dtype bfloat16] [--device cuda]
    python benchmarks/full_size.py flux sana --layers 2 --device cuda   newer kinds at their real width, two blocks deep

It shows that nothing depends on the small sizes of the embedded bases, what a step costs in seconds and memory, and how
much memory `check` predicts for the same recipe. On a GPU, the allocator is compared with that; on a CPU only with
`--allocator`, which takes a further step under the profiler. The figures go to
benchmarks/results/full_size_<kind>_<device>.json. Weights are random, so do not expect pictures.
"""

import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import measure
import torch
import typer
from config_only import write_folder
from full_size_models import KINDS, PUBLISHED, make_on, make_toy

from agsm_rl.backbones import frozen_pipeline
from agsm_rl.doctor.memory.predict import Prediction, always_in_use, predict
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.trainer import Trainer

GIB = 2**30
POLICY_GRADIENTS = {"sd15": "ddpo", "sdxl": "ddpo"}
"""Flow-GRPO for the kinds that are not named."""


def recipe_of(term: str, backbone: dict[str, Any], *, batch_size: int, images: int, num_steps: int) -> Recipe:
    """A recipe with one term: AGSM over captioned images with two prompts each, another over images that it draws."""
    source: dict[str, Any] = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": batch_size}
    options: dict[str, Any] = {"group_size": 2}
    if term == "agsm":
        source |= {"num_images": 4 * batch_size}
    else:
        source = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"brightness": 1.0}}
        source |= {"num_prompts": images // 2, "images_per_prompt": 2, "num_steps": num_steps, "guidance": 1.0}
        source |= {"advantages": "group", "sample_batch_size": 1}
        options = {}
    return Recipe.from_data(
        {
            "steps": 2,
            "backbone": {"use": "auto", **backbone},
            "adapters": {"tokens": {"use": "soft_tokens", "num_tokens": 4}},
            "objectives": [{"use": term, "source": source, **options}],
            "track": [],
        }
    )


@contextmanager
def in_memory(pipeline: Any) -> Iterator[None]:
    """Within the block, a backbone gets this pipeline where it would load weights; on the meta device it loads."""
    load = frozen_pipeline.load_pipeline

    def given(checkpoint: str, *, empty: bool = False, **options: Any) -> Any:
        return load(checkpoint, empty=True, **options) if empty else pipeline

    with patch.object(frozen_pipeline, "load_pipeline", given):
        yield


def step_cost(trainer: Trainer, device: str, *, warmup: int, repeats: int) -> dict[str, Any]:
    """Median seconds of a step and peak memory; on a CPU, the peak is the process's, its libraries included."""
    for _ in range(warmup):
        trainer.run_step()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    metrics: dict[str, float] = {}
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        metrics = trainer.run_step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else measure.resident_bytes(peak=True)
    figures = {key: round(value, 6) for key, value in metrics.items() if "/" in key}
    median = statistics.median(seconds)
    return {"seconds": round(median, 2 if median > 1 else 4), "peak_gib": round(peak / GIB, 3), "metrics": figures}


def prediction_of(recipe: Recipe) -> Prediction | str:
    """The memory predicted for the recipe, or why there is no prediction; the step is worth measuring without it."""
    try:
        return predict(recipe)[1]
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def compare(recipe: Recipe, pipeline: Any, device: str, *, allocator: bool, **counts: int) -> dict[str, Any]:
    """What a step of the recipe costs, and the memory predicted for it."""
    prediction = prediction_of(recipe)
    gc.collect()  # the term before
    with in_memory(pipeline):
        trainer = build_trainer(recipe)
    cost = step_cost(trainer, device, **counts)
    measured = cost["peak_gib"] if device.startswith("cuda") else None
    if allocator and measured is None:
        measured = (measure.allocator_peak(trainer.run_step) + sum(always_in_use(trainer).values())) / GIB
    if isinstance(prediction, str):
        cost["no_prediction"] = prediction
    else:
        steps = [peak for phase, peak in prediction.peaks.items() if phase.startswith(("drawing ", "learning "))]
        cost["predicted_gib"] = round(max(steps) / GIB, 3)
        if measured is not None:
            cost |= {"allocated_gib": round(measured, 3), "predicted/allocated": round(max(steps) / GIB / measured, 3)}
    for adapter in list(trainer.policy.backbone.adapters):
        adapter.detach()
    return cost


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    resolution: int | None
    dtype: str
    device: str
    terms: list[str] | None
    layers: int | None
    toy: bool
    gradient_checkpointing: bool
    batch_size: int
    images: int
    num_steps: int
    warmup: int
    repeats: int
    allocator: bool
    results: Path

    def describe(self, kind: str) -> str:
        """What is measured, in words."""
        size = "tiny" if self.toy else f"{self.layers} blocks deep" if self.layers else "at full size"
        pixels = f"{self.resolution} px, " if self.resolution else ""
        checkpointing = "gradient checkpointing, " if self.gradient_checkpointing else ""
        return (
            f"random {kind} {size}, {pixels}{self.dtype}, {checkpointing}4 tokens; AGSM: {self.batch_size} images x 2 "
            f"prompts; others: {self.images} images x {self.num_steps} sampling steps"
        )


def measure_kind(kind: str, settings: Settings) -> None:
    """Run the terms on one kind of model, one after the other, and record what they cost."""
    torch.manual_seed(0)
    device, dtype = settings.device, getattr(torch, settings.dtype)
    pipeline = make_toy(kind, device, dtype) if settings.toy else make_on(kind, device, dtype, layers=settings.layers)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    steps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_folder(pipeline, Path(folder) / kind)
        backbone = {"checkpoint": str(checkpoint), "device": device, "dtype": settings.dtype}
        backbone |= {"resolution": settings.resolution, "gradient_checkpointing": settings.gradient_checkpointing}
        sizes = {key: getattr(settings, key) for key in ("batch_size", "images", "num_steps")}
        counts = {key: getattr(settings, key) for key in ("warmup", "repeats")}
        for term in settings.terms or ["agsm", POLICY_GRADIENTS.get(kind, "flow_grpo")]:
            recipe = recipe_of(term, backbone, **sizes)
            steps[term] = compare(recipe, pipeline, device, allocator=settings.allocator, **counts)
            print(kind, term, steps[term], flush=True)
            # Write after each, so that its figures survive if the next one, which takes minutes on a CPU, is cut off.
            measure.write_result(
                f"full_size_{kind}_{device.partition(':')[0]}",
                what=settings.describe(kind),
                device=device,
                results=settings.results,
                denoiser_parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
                steps=steps,
            )


def main(
    kinds: Annotated[list[str], typer.Argument(help=f"of {', '.join(KINDS)}")],
    resolution: Annotated[int | None, typer.Option(help="default: the model's own")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="type of the frozen weights")] = "float32",
    device: str = "cpu",
    terms: Annotated[list[str] | None, typer.Option(help="default: agsm, and ddpo or flow_grpo")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="blocks of each part; newer kinds need it")] = None,
    toy: Annotated[bool, typer.Option(help="the shipped or a tiny model of this kind, for a trial")] = False,
    gradient_checkpointing: bool = True,
    batch_size: Annotated[int, typer.Option(min=2, help="images for AGSM, with two prompts each")] = 2,
    images: Annotated[int, typer.Option(min=2, help="images per draw for the others")] = 2,
    num_steps: Annotated[int, typer.Option(min=1, help="sampling steps for the others")] = 2,
    warmup: Annotated[int, typer.Option(min=0)] = 0,
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    allocator: Annotated[bool, typer.Option(help="on a CPU: measure the allocator's peak too")] = False,
    results: Path = measure.RESULTS,
) -> None:
    """Measure each kind; one that fails is reported, and the next one measured."""
    settings = Settings(
        resolution, dtype, device, terms, layers, toy, gradient_checkpointing, batch_size, images, num_steps, warmup,
        repeats, allocator, results,
    )  # fmt: skip
    for kind in kinds:
        if kind not in KINDS or (kind not in PUBLISHED and layers is None and not toy):
            raise typer.BadParameter(f"{kind}: one of {', '.join(KINDS)}; those after {PUBLISHED[-1]} need --layers")
    failed = []
    for kind in kinds:
        try:
            measure_kind(kind, settings)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            failed.append(kind)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

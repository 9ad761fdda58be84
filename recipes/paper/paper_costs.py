"""What a command costs: memory as `agsm-rl check` predicts it, and time as an estimate from counted FLOPs.

    seconds = FLOPs / (SHARE · the GPU's peak)
Both come from the published configurations at full size on torch's meta device (benchmarks/full_size_models.py), where
tensors have shapes and no memory: no weights are needed and nothing is measured. `count` makes the figures, costs.json
keeps them. A product of [m, k] and [k, n] counts 2·m·k·n. Not counted: reward models, detectors, data loading.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_plan import ARMS, HERE, MODELS, Part, Place, all_parts

RECORD, PAGE = HERE / "costs.json", HERE / "README.md"
BEGIN, END = "<!-- made by `reproduce.py costs` -->", "<!-- end -->"
SHARE = 0.35
"""Of the peak that is reached: an assumption, not a measurement."""
REWARD_MODELS_GIB = 11.0
"""ImageReward, CLIP L, and twice CLIP H (HPSv2, PickScore), in float32, beside the base."""
TOKENS = 4
CHANGED = [arm for arm in ARMS.values() if arm.sets and not any("unet=" in text for text in arm.sets)]
"""Arms whose --set may change what a step costs; another U-Net is of the same size."""


@dataclass(frozen=True)
class GPU:
    """Dense peak in TFLOP/s by the type of the weights (float32 multiplied in TF32), and memory in GB."""

    bfloat16: float
    float32: float
    memory: int


GPUS = {
    "H100": GPU(bfloat16=989, float32=494, memory=80),
    "A100": GPU(bfloat16=312, float32=156, memory=80),
    "RTX4090": GPU(bfloat16=165, float32=82.6, memory=24),
}
"""NVIDIA's data sheets: H100 SXM, A100 80 GB, RTX 4090, without sparsity."""


def read() -> dict[str, Any]:
    """costs.json."""
    content: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return content


def flops_of(part: Part, costs: dict[str, Any]) -> float:
    """FLOPs of a command; 0 for one that neither trains nor draws."""
    arm = ARMS[part.arm]
    model = costs["models"][arm.model]
    if part.suite is not None:
        return part.images * drawing_flops(arm.model, model)
    if arm.recipe is None:
        return 0.0
    recipe = costs["arms"].get(arm.key) or costs["recipes"][arm.recipe]
    step = recipe["forward"] * model["512"]["forward"] + recipe["backward"] * 2 * model["512"]["backward"]
    step += recipe["images"] * (model["512"]["encode"] + model["text"])
    return float(recipe["steps"] * step + recipe["drawn"] * drawing_flops(arm.model, model))


def drawing_flops(name: str, model: dict[str, Any]) -> float:
    """FLOPs of one image: two rows a step, with and without the prompt, and its decoding."""
    size = model[str(MODELS[name].resolution)]
    return float(MODELS[name].num_steps * 2 * size["forward"] + size["decode"] + 2 * model["text"])


def seconds(part: Part, costs: dict[str, Any], gpu: str) -> float:
    """The estimate."""
    peak = getattr(GPUS[gpu], MODELS[ARMS[part.arm].model].dtype) * 1e12
    return flops_of(part, costs) / (SHARE * peak)


def gib(part: Part, costs: dict[str, Any]) -> float:
    """Memory on the GPU: the predicted peak, with the reward models where they score; 0 where there is no base."""
    arm = ARMS[part.arm]
    recipe = costs["arms"].get(arm.key) or costs["recipes"][arm.recipe or f"{arm.model}_agsm"]
    if part.name.endswith("/convert") or part.suite == "fid":
        return 0.0
    if part.suite is not None:
        return float(recipe["evaluating_gib"]) + REWARD_MODELS_GIB
    return max(float(recipe["peak_gib"]), float(recipe["evaluating_gib"]) + REWARD_MODELS_GIB)


def as_time(amount: float) -> str:
    """Minutes or hours, as far as an estimate goes."""
    return f"{amount / 3600:.1f} h" if amount >= 3600 else f"{max(1, round(amount / 60))} min" if amount else "-"


def with_table(text: str) -> str:
    """The page with the table of what training and measuring cost, between its marks."""
    costs, place = read(), Place(out=Path("out"), data=Path("data"))
    lines = ["| command | GPU memory | " + " | ".join(GPUS) + " |", "|---|---|" + "---|" * len(GPUS)]
    shown = {arm.recipe: arm.key for arm in ARMS.values() if arm.recipe and not arm.sets}
    for key in (*shown.values(), *(f"{model}/base" for model in MODELS)):
        for part in all_parts(place, tables=["coco", "geneval"], arms=[key], seeds=1):
            name = part.name.replace("/seed0/", " ")
            if part.name.endswith("/train") or (key.endswith("/base") and part.suite != "fid"):
                times = [as_time(seconds(part, costs, gpu)) if _fits(part, costs, gpu) else "–" for gpu in GPUS]
                lines.append(f"| {name} | {gib(part, costs):.0f} GiB | " + " | ".join(times) + " |")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.split(END)[1]}"


def _fits(part: Part, costs: dict[str, Any], gpu: str) -> bool:
    return gib(part, costs) * 2**30 * 1.15 <= GPUS[gpu].memory * 1e9


def count() -> dict[str, Any]:
    """The figures of all models, recipes and changed arms, from the configurations."""
    costs: dict[str, Any] = {"models": {}, "recipes": {}, "arms": {}}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            pipeline, checkpoint = full_size(name, Path(folder) / name)
            costs["models"][name] = _flops_of_model(name, pipeline)
            for recipe in sorted({arm.recipe for arm in ARMS.values() if arm.recipe and arm.model == name}):
                costs["recipes"][recipe] = predicted(recipe, checkpoint, Path(folder))
                print(recipe, costs["recipes"][recipe], flush=True)
            for arm in (arm for arm in CHANGED if arm.model == name):
                costs["arms"][arm.key] = predicted(str(arm.recipe), checkpoint, Path(folder), arm.sets)
                print(arm.key, costs["arms"][arm.key], flush=True)
    return costs


def full_size(name: str, folder: Path) -> tuple[Any, Path]:
    """A published model's pipeline on the meta device, and a folder of its configurations."""
    import torch

    benchmarks = str(HERE.parents[1] / "benchmarks")
    if benchmarks not in sys.path:
        sys.path.append(benchmarks)
    from config_only import write_folder
    from full_size_models import MAKERS, make_sd3

    with torch.device("meta"):
        pipeline = make_sd3(t5=True) if name == "sd3" else MAKERS[name]()
    return pipeline, write_folder(pipeline, folder)


def predicted(recipe: str, checkpoint: Path, folder: Path, sets: Sequence[str] = ()) -> dict[str, Any]:
    """Memory, rows per step and images drawn of a recipe's run, on a checkpoint of configurations alone.

    Every option of the recipe and of `sets`, its --set, is checked on the way, as `agsm-rl check` does; only where data
    and denoiser come from is changed, and what is measured in between, whose weights and prompts are the user's.
    """
    from agsm_rl.doctor.memory.predict import predict
    from agsm_rl.recipe.recipe import Recipe

    prompts = folder / "captions.txt"
    prompts.write_text("a red star\n", encoding="utf-8")
    changed = [f"backbone.checkpoint={checkpoint}", "backbone.device=cpu", "track=[]"]
    changed += ["objectives.0.source.dataset=builtin:shapes", "objectives.0.source.num_images=4"]
    changed += [f"evaluate.suites.coco.prompts={prompts}", "evaluate.suites.coco.rewards={brightness: {}}"]
    changed += ["checkpoint.best=null", *([f"backbone.unet={checkpoint}"] if "_then_" in recipe else [])]
    read = Recipe.from_yaml(HERE / f"{recipe}.yaml", [*sets, *changed])
    trainer, prediction = predict(read)
    if isinstance(prediction, str):
        raise RuntimeError(f"{recipe}: {prediction}")
    (passes,) = (passes for phase, passes in prediction.passes.items() if phase.startswith("learning"))
    evaluate = read.evaluate
    every = evaluate.every if evaluate and evaluate.every else read.steps
    watched = next(iter(evaluate.blocks.values())).options["num_images"] if evaluate else 0
    return {
        "steps": read.steps,
        "forward": passes.forward,
        "backward": passes.backward,
        "images": trainer.terms[0].source._source.batch_size,  # type: ignore[attr-defined]
        "drawn": watched * (read.steps // every + 1),
        "peak_gib": round(prediction.peak / 2**30, 2),
        "phase": prediction.phase,
        "evaluating_gib": round(prediction.peaks["evaluating"] / 2**30, 2),
    }


def _flops(run: Callable[[], Any]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return float(counter.get_total_flops())


def _flops_of_model(name: str, pipeline: Any) -> dict[str, Any]:
    """What an image costs at 512 px and as it is drawn, by resolution, and `text`, what one prompt costs."""
    import torch

    with torch.device("meta"):
        sizes = {str(side): _flops_of_image(name, pipeline, side) for side in sorted({512, MODELS[name].resolution})}
        with torch.no_grad():
            return sizes | {"text": sum(_flops(run) for run in _encoders(name, pipeline))}


def _flops_of_image(name: str, pipeline: Any, resolution: int) -> dict[str, float]:
    """One row through the denoiser forward, and backward to its text; one image through the VAE and back."""
    import torch

    denoiser = pipeline.transformer if name == "sd3" else pipeline.unet
    denoiser.requires_grad_(False)
    channels, width, length = {"sd15": (4, 768, 77), "sdxl": (4, 2048, 77), "sd3": (16, 4096, 77 + 512)}[name]
    latents = torch.empty(1, channels, resolution // 8, resolution // 8)
    text = torch.empty(1, length + TOKENS, width, requires_grad=True)
    given = {"timestep": torch.empty(1), "encoder_hidden_states": text, "return_dict": False, **_conditions(name)}
    predictions: list[torch.Tensor] = []
    flops = {
        "forward": _flops(lambda: predictions.append(denoiser(latents, **given)[0])),
        "backward": _flops(lambda: predictions[0].sum().backward()),
    }
    with torch.no_grad():
        flops["decode"] = _flops(lambda: pipeline.vae.decode(latents))
        flops["encode"] = _flops(lambda: pipeline.vae.encode(torch.empty(1, 3, resolution, resolution)))
    return flops


def _conditions(name: str) -> dict[str, Any]:
    """What the denoiser takes beside latents, time and text."""
    import torch

    if name == "sdxl":
        return {"added_cond_kwargs": {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}}
    return {"pooled_projections": torch.empty(1, 2048)} if name == "sd3" else {}


def _encoders(name: str, pipeline: Any) -> list[Callable[[], Any]]:
    import torch

    ids, long = torch.zeros(1, 77, dtype=torch.long), torch.zeros(1, 512, dtype=torch.long)
    encoders = [lambda: pipeline.text_encoder(ids)]
    encoders += [lambda: pipeline.text_encoder_2(ids)] if name in ("sdxl", "sd3") else []
    return encoders + ([lambda: pipeline.text_encoder_3(long)] if name == "sd3" else [])

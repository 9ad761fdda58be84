"""What `agsm-rl check` prints: what would be trained, on what, and the memory the run will need."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from agsm_rl.doctor.memory.fit import MARGIN, Fit
from agsm_rl.doctor.memory.passes import drawn_alike
from agsm_rl.doctor.memory.predict import NOT_COUNTED, Prediction, always_in_use
from agsm_rl.export.attach import read_exports
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block
from agsm_rl.trainer import Trainer
from agsm_rl.training.sizes import size_of


def describe(recipe: Recipe, trainer: Trainer) -> str:
    """A few lines about a recipe and a trainer built from it, which may be on the meta device."""
    backbone, policy = trainer.policy.backbone, trainer.policy
    size_in_px = f"{size_of(backbone.resolution)} px"
    checkpoint = recipe.backbone.options.get("checkpoint")
    device = recipe.backbone.options.get("device") or trainer.accelerator.device
    lines = [f"backbone    {recipe.backbone.use}, {checkpoint}, {size_in_px}, {device}"]
    for name, block in recipe.adapters.items():
        tensors = policy.parameters([name]).values()
        state = "trained" if name in trainer.trained else "frozen"
        lines.append(
            f"adapter     {name}: {block.use}, {count(tensors):,} parameters {state} in {len(tensors)} tensors"
        )
    if recipe.start_from is not None:
        exports = read_exports(recipe.start_from)
        new = [name for name in recipe.adapters if name not in exports]
        suffix = f"; new: {', '.join(new)}" if new else ""
        lines.append(f"start       from the adapters of {recipe.start_from}{suffix}")
        if recipe.reference == "start_from":
            lines.append("reference   the model with the adapters that it starts from, as loaded")
    for term in recipe.objectives:
        source = f"source '{term.source}'" if not isinstance(term.source, Block) else _source(term.source)
        source += f" through {term.view.use}" if term.view else ""
        which = "all adapters" if term.trains is None else ", ".join(term.trains)
        weight = term.weight if isinstance(term.weight, dict) else f"{term.weight:g}"
        often = "every step" if term.every == 1 else f"every {term.every} steps"
        often += f" from step {term.offset}" if term.offset else ""
        lines.append(f"term        {term.name}: {term.use} on {source}, weight {weight}, {often}, trains {which}")
    for name, block in recipe.sources.items():
        unused = "" if any(term.source == name for term in recipe.objectives) else "; no term learns from it"
        lines.append(f"source      {name}: {_source(block)}{unused}")
    lines.append(f"steps       {recipe.steps}, combined by {recipe.combine}, seed {recipe.seed}")
    return "\n".join(lines)


def memory(trainer: Trainer, prediction: Prediction | str) -> list[str]:
    """The peak and its parts; without a prediction, the memory that is certainly needed."""
    if isinstance(prediction, str):
        rows = always_in_use(trainer)
        lines = [f"memory      at least {readable(sum(rows.values()))}: {listed(rows)}; activations come on top"]
        return [*lines, f"            no prediction of the peak: {prediction}", f"            {NOT_COUNTED}"]
    rows = prediction.resident
    return [
        f"memory      {readable(prediction.peak)} at its peak, in {prediction.phase} (predicted; see docs/memory.md)",
        f"            all the time {readable(sum(rows.values()))}: {listed(rows)}",
        f"            peaks, that included: {listed(prediction.peaks)}",
        f"            {NOT_COUNTED}",
    ]


def unused(recipe: Recipe, trainer: Trainer, prediction: Prediction | str) -> list[str]:
    """What the recipe says and no term heeds, as the rehearsal of its steps has shown."""
    if recipe.reference == "base" or isinstance(prediction, str) or trainer.policy.referred:
        return []
    return [f"reference   {recipe.reference} changes nothing: no term uses a reference"]


def costs(recipe: Recipe, prediction: Prediction | str) -> list[str]:
    """What a draw and each term's step cost in passes through the denoiser, and which draws could be one."""
    lines = []
    if not isinstance(prediction, str) and prediction.passes:
        shown = [f"{phase}: {passes}" for phase, passes in prediction.passes.items()]
        lines = [f"passes      {shown[0]}", *(f"            {one}" for one in shown[1:])]
        lines[-1] += " (rows through the denoiser, per draw and per step; with guidance an image is two)"
    for first, second in drawn_alike(recipe):
        lines.append(
            f"share       {first} and {second} each draw images by equal rollouts: write the block once under "
            "`sources:` and name it in both, and they learn from one draw"
        )
    return lines


def proposal(fit: Fit, budget: float) -> str:
    """The line for `--fit-vram`: the changes that make the run fit, if any do."""
    of = f"{readable(fit.prediction.peak)} at its peak, in {fit.prediction.phase}"
    if not fit.fits:
        even = f", even with {settings(fit.changes)}" if fit.changes else ""
        return (
            f"vram        does not fit {readable(budget)} with {MARGIN:.0%} to spare: {of}{even}. "
            "What is left to lower: batch_size, resolution, num_prompts, images_per_prompt"
        )
    if not fit.changes:
        return f"vram        fits {readable(budget)} as it is, with {MARGIN:.0%} to spare"
    return f"vram        fits {readable(budget)} with {MARGIN:.0%} to spare by {settings(fit.changes)} ({of})"


def settings(changes: Mapping[str, Any]) -> str:
    """A recipe's changes as command-line options."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    return " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in values.items())


def listed(rows: Mapping[str, int]) -> str:
    """Names with their sizes."""
    return ", ".join(f"{name} {readable(value)}" for name, value in rows.items())


def count(tensors: Iterable[Tensor]) -> int:
    """Number of elements in the tensors."""
    return sum(tensor.numel() for tensor in tensors)


def readable(amount: float) -> str:
    """A number of bytes in a suitable unit."""
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def _source(block: Block) -> str:
    options = block.options
    of = options.get("dataset") or options.get("prompts") or ""
    rewards = options.get("rewards")
    return f"{block.use} of {of}" + (f" with rewards {rewards}" if rewards else "")

"""`agsm-rl eval` on the shapes suite without storing images: draw and judge, print the tables, write the scores."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings, pinned
from agsm_rl.evaluate.table import print_table
from agsm_rl.evaluate.target import Target
from agsm_rl.files import write_text
from agsm_rl.interfaces import Bank
from agsm_rl.recipe.options import explain
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.measurement import measure, to_json
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt


@dataclass(frozen=True)
class InMemoryOptions:
    """What to draw. By default, guidance and num_steps are the target's, and batch_size is a recipe's default."""

    num_images: int = 600
    split: str = "held_out"
    bank: Bank = "positive"
    guidance_bank: GuidanceBank | None = None
    guidance_prompt: GuidancePrompt | None = None
    seed: int = 0
    guidance: float | None = None
    num_steps: int | None = None
    batch_size: int | None = None
    prompt_suffix: str = ""


def evaluate_in_memory(target: Target, options: InMemoryOptions, *, compare: bool, json_file: Path | None) -> None:
    """Measure a target on the shapes suite and, with `compare`, its base on the same prompts and noise."""
    settings = _complete(options, target)
    if compare and target.handle is None:
        raise UserError("--compare: the target is a base itself; give a run folder or an exported adapter.")
    guidance = settings.guidance[0]
    with target.using(settings.bank, settings.guidance_bank, settings.guidance_prompt):
        form = target.guidance_form()
        trained = measure(target.backbone, settings, guidance, {})
    base = None
    if compare and target.handle is not None:
        target.handle.detach()
        base = measure(target.backbone, settings, guidance, {})
    if base is None:
        print_table(trained.result)
    else:
        print_table(base.result, trained.result)
    content = to_json([(base, trained)] if base is not None else [(None, trained)], settings)
    content["drawing"] = _drawing(target, settings) | form
    if json_file is not None:
        write_text(json_file, json.dumps(content, indent=1) + "\n")


def _complete(options: InMemoryOptions, target: Target) -> Evaluate:
    values: dict[str, Any] = {"guidance": target.guidance, "num_steps": target.num_steps}
    values |= {key: value for key, value in asdict(options).items() if value is not None}
    try:
        return Evaluate.model_validate(values)
    except ValidationError as error:
        raise explain(error, where="eval: ") from error


def _drawing(target: Target, settings: Evaluate) -> dict[str, Any]:
    drawing = DrawingSettings(
        seed=settings.seed,
        guidance=settings.guidance[0],
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        prompt_suffix=settings.prompt_suffix,
    )
    return pinned(target, drawing)

"""The teachers that a recipe's terms name: another run's adapters on the same base, or another checkpoint beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agsm_rl.backbones.loading import ALLOWED, find_checkpoint, is_single_file
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach_to_backbone, find_exports
from agsm_rl.files import local_or_hub, local_path
from agsm_rl.interfaces import Backbone
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block
from agsm_rl.term import Term
from agsm_rl.training.stages import stage

REPLACING = ("unet", "transformer", "lora", "config")
"""Options that change what a checkpoint is: the base's are not the teacher's."""
TRAINED_ONLY = {"compile": None, "gradient_checkpointing": False}
"""Options of a base that is learned on."""


def check_teacher(recipe: Recipe, teacher: str, place: str) -> None:
    """UserError for a teacher that is not there, or that would teach nothing; no hub is asked."""
    if not _is_checkpoint(teacher, where=recipe.parts.at(place)):
        try:
            find_exports(Path(teacher))
        except UserError as error:
            raise recipe.parts.refuse(place, str(error)) from error
        return
    options = recipe.backbone.options
    if "checkpoint" not in options:
        raise recipe.parts.refuse(
            place, f"'{teacher}' is a checkpoint, but the backbone '{recipe.backbone.use}' loads none; give a run"
        )
    changed = any(options.get(key) is not None for key in REPLACING)
    if not changed and _same(teacher, str(options["checkpoint"])):
        raise recipe.parts.refuse(
            place, f"'{teacher}' is this run's own base; leave it out, and the teacher is the base at no cost in memory"
        )


def add_teachers(policy: Policy, recipe: Recipe, terms: Sequence[Term]) -> None:
    """Load each teacher once, whoever learns from it."""
    places = {term.objective.teacher: f"objectives[{index}].teacher" for index, term in enumerate(terms)}
    for teacher, place in places.items():
        if teacher is None:
            continue
        try:
            if _is_checkpoint(teacher, where=recipe.parts.at(place)):
                policy.add_teacher_base(teacher, _load(recipe, teacher, policy.backbone, place))
            else:
                taught = attach_to_backbone(policy.backbone, teacher, allow_imports=recipe.parts.allow_imports)
                policy.add_teacher(teacher, taught.adapters.values())
        except UserError as error:
            if str(error).startswith(recipe.parts.where):
                raise
            raise recipe.parts.refuse(place, f"'{teacher}': {error}") from error


def _is_checkpoint(teacher: str, *, where: str) -> bool:
    """Whether it is a checkpoint, and not a run or exported adapters; UserError if it is none of them."""
    if teacher.startswith("builtin:"):
        find_checkpoint(teacher, where)
        return True
    path = local_path(teacher)
    if path.exists():
        return is_single_file(path) or (path / "model_index.json").is_file()
    local_or_hub(teacher, where=f"{where}:", allowed=f"a run folder, exported adapters, or a checkpoint: {ALLOWED}")
    return True


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def _load(recipe: Recipe, teacher: str, base: Backbone, place: str) -> Backbone:
    """The teacher's checkpoint, with the base's options, on its device, for pictures of its size."""
    given = recipe.backbone.options
    instead = dict.fromkeys(REPLACING) | TRAINED_ONLY | {"device": str(base.device), "resolution": base.resolution}
    options = given | {key: value for key, value in instead.items() if key in given} | {"checkpoint": teacher}
    block = Block(use=recipe.backbone.use, **options)
    with stage(f"loading {teacher}", announce=True):
        backbone: Backbone = recipe.parts.construct("backbones", block, place, seed=0)
    return backbone

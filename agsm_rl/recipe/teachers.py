"""The teachers that a recipe's terms name: another run's adapters on the same base, or another checkpoint beside it."""

from __future__ import annotations

from collections.abc import Sequence

from agsm_rl.export.attach import attach_to_backbone
from agsm_rl.interfaces import Backbone
from agsm_rl.policy import Policy
from agsm_rl.recipe.places import REPLACING, is_checkpoint, located
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block
from agsm_rl.term import Term
from agsm_rl.training.stages import stage

TRAINED_ONLY = {"compile": None, "gradient_checkpointing": False}
"""Options of a base that is learned on."""


def add_teachers(policy: Policy, recipe: Recipe, terms: Sequence[Term]) -> None:
    """Load each teacher once, whoever learns from it."""
    places = {term.objective.teacher: f"objectives[{index}].teacher" for index, term in enumerate(terms)}
    for teacher, place in places.items():
        if teacher is None:
            continue
        where = recipe.parts.at(place)
        if is_checkpoint(teacher, where=where):
            base = _load(recipe, teacher, policy.backbone, place)
            with located(f"{where}: '{teacher}'"):
                policy.add_teacher_base(teacher, base)
        else:
            with located(f"{where}: '{teacher}'"):
                taught = attach_to_backbone(policy.backbone, teacher, allow_imports=recipe.parts.allow_imports)
                policy.add_teacher(teacher, taught.adapters.values())


def _load(recipe: Recipe, teacher: str, base: Backbone, place: str) -> Backbone:
    """The teacher's checkpoint, with the base's options, on its device, for pictures of its size."""
    given = recipe.backbone.options
    # What changes the base's checkpoint is not the teacher's.
    instead = dict.fromkeys(REPLACING) | TRAINED_ONLY | {"device": str(base.device), "resolution": base.resolution}
    options = given | {key: value for key, value in instead.items() if key in given} | {"checkpoint": teacher}
    block = Block(use=recipe.backbone.use, **options)
    with stage(f"loading {teacher}", announce=True):
        backbone: Backbone = recipe.parts.construct("backbones", block, place, seed=0)
    return backbone

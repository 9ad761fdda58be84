"""Images as a measure of a run's cost: how many a recipe takes in so many steps, and how many steps images pay for.

An image counts when a source hands it out. Rollouts: the images of a draw, when they are drawn (`updates` steps learn
from one draw, which counts once). Pairs: `batch_size` a step. Preferences: two for each. Prompts, from which an
objective draws its own images: `batch_size` a step. A source counts in the steps in which at least one of its terms is
due, and once however many terms share it. Evaluation does not count.
"""

from __future__ import annotations

from collections.abc import Iterator

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PreferenceBatch
from agsm_rl.policy import Source
from agsm_rl.recipe.build import build_terms
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.sources.rollouts import Rollouts

MOST_STEPS = 10_000_000
"""No run is longer; the number of steps of a run that is stopped by the clock."""
IDLE = 100_000
"""Steps without an image after which nothing more is expected."""


def images_taken(recipe: Recipe, steps: int) -> int:
    """Images that a recipe has taken in after `steps` steps."""
    return sum(taken for _, taken in zip(range(steps), _images_by_step(recipe), strict=False))


def steps_for(recipe: Recipe, images: int) -> int:
    """The most steps that take in no more than `images` images; UserError when not even one does, or all do."""
    total, idle = 0, 0
    for step, taken in enumerate(_images_by_step(recipe)):
        if total + taken > images:
            if step == 0:
                raise recipe.parts.refuse("budget.images", f"{images} pay for no step; the first takes in {taken}.")
            return step
        total, idle = total + taken, 0 if taken else idle + 1
        if idle > IDLE or step > MOST_STEPS:
            raise recipe.parts.refuse(
                "budget.images", f"the recipe takes in {total} images and no more, however long it is."
            )
    raise AssertionError("the counts never end")


def _images_by_step(recipe: Recipe) -> Iterator[int]:
    """The images that each step takes in, without end."""
    terms = build_terms(recipe)
    calls: dict[int, int] = {}
    step = 0
    while True:
        due = {id(term.source): term.source for term in terms if term.is_due(step)}
        taken = 0
        for name, source in due.items():
            taken += _handed_out(source, calls.get(name, 0), where=recipe.parts.where)
            calls[name] = calls.get(name, 0) + 1
        yield taken
        step += 1


def _handed_out(source: Source, call: int, *, where: str) -> int:
    """What a source hands out in its call of that number."""
    if isinstance(source, Rollouts):
        return 0 if call % source.updates else source.num_prompts * source.images_per_prompt
    size = source.batch_size
    if size is None:
        raise UserError(
            f"{where}: budget.images: the source {type(source).__name__} has no `batch_size`, so its images cannot be "
            "counted; use a budget in steps or seconds."
        )
    return 2 * size if issubclass(source.gives, PreferenceBatch) else size

"""Images as a measure of a run's cost: how many images a number of steps consumes, and how many steps images pay for.

An image counts when a source returns it. Rollouts: the images of a draw, when they are drawn (`updates` steps learn
from one draw, which counts once). Pairs: `batch_size` per step. Preferences: two per pair. Step preferences:
`num_prompts` · `candidates` of a draw, when they are drawn. Prompts, from which an objective draws its own images:
`batch_size` per step. A source counts in the steps in which at least one of its terms is due, and only once if several
terms share it. Evaluation does not count.
"""

from __future__ import annotations

from collections.abc import Iterator

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PreferenceBatch
from agsm_rl.policy import Source
from agsm_rl.recipe.build import build_terms
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.sources.rollouts import Rollouts
from agsm_rl.sources.step_preferences import StepPreferences

MAX_STEPS = 10_000_000
"""The most steps of a run; also the number of steps of a run with a budget in seconds."""
MAX_IDLE_STEPS = 100_000
"""After this many steps without an image, no more images are expected."""


def images_taken(recipe: Recipe, steps: int) -> int:
    """The number of images that a recipe consumes in its first `steps` steps."""
    return sum(taken for _, taken in zip(range(steps), _images_by_step(recipe), strict=False))


def steps_for(recipe: Recipe, images: int) -> int:
    """The most steps that consume at most `images` images.

    UserError if the first step already consumes more, or if no number of steps ever does.
    """
    total, idle = 0, 0
    for step, taken in enumerate(_images_by_step(recipe)):
        if total + taken > images:
            if step == 0:
                raise recipe.parts.refuse(
                    "budget.images", f"{images} is too few for a single step; the first one takes {taken}."
                )
            return step
        total, idle = total + taken, 0 if taken else idle + 1
        if idle > MAX_IDLE_STEPS or step > MAX_STEPS:
            raise recipe.parts.refuse(
                "budget.images", f"the recipe never takes more than {total} images, however long it runs."
            )
    raise AssertionError("the counts never end")


def _images_by_step(recipe: Recipe) -> Iterator[int]:
    """The number of images that each step consumes, without end."""
    terms = build_terms(recipe)
    calls: dict[int, int] = {}
    step = 0
    while True:
        due = {id(term.source): term.source for term in terms if term.is_due(step)}
        taken = 0
        for name, source in due.items():
            taken += _num_images(source, calls.get(name, 0), where=recipe.parts.where)
            calls[name] = calls.get(name, 0) + 1
        yield taken
        step += 1


def _num_images(source: Source, call: int, *, where: str) -> int:
    """The number of images that a source returns in its call number `call`, counted from 0."""
    if isinstance(source, Rollouts):
        return 0 if call % source.updates else source.num_prompts * source.images_per_prompt
    if isinstance(source, StepPreferences):
        return 0 if call % source.updates else source.num_prompts * source.candidates
    size = source.batch_size
    if size is None:
        raise UserError(
            f"{where}: budget.images: the source {type(source).__name__} has no `batch_size`, so its images cannot be "
            "counted; give the budget in steps or seconds."
        )
    return 2 * size if issubclass(source.gives, PreferenceBatch) else size

"""From the options of `agsm-rl eval` to the suite that they describe; what does not go together is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.evaluate.prompts import read_prompts
from agsm_rl.evaluate.suite import Suite

if TYPE_CHECKING:
    from agsm_rl.recipe.schema import Evaluate

SUITES = ("shapes", "geneval", "rewards", "fid")
# Options of single suites: the option's name, and the suites that it goes with.
GOES_WITH = {
    "split": ("shapes",),
    "detector": ("geneval",),
    "classifier": ("geneval",),
    "reward": ("rewards",),
    "rewards_file": ("rewards",),
    "prompts": ("rewards", "fid"),
    "prompt_column": ("rewards", "fid"),
    "prompt_split": ("rewards", "fid"),
    "reference": ("fid",),
    "inception": ("fid",),
}


@dataclass(frozen=True)
class SuiteOptions:
    """The options of single suites, None (or empty) where they are not given."""

    split: str | None = None
    detector: str | None = None
    classifier: str | None = None
    reward: Sequence[str] | None = None
    rewards_file: Path | None = None
    prompts: str | None = None
    prompt_column: str | None = None
    prompt_split: str | None = None
    reference: Path | None = None
    inception: Path | None = None

    def check(self, suite: str) -> None:
        """UserError for an unknown suite, or an option that is none of its."""
        if suite not in SUITES:
            raise unknown_name("--suite", suite, "a suite", SUITES)
        for name, suites in GOES_WITH.items():
            if getattr(self, name) and suite not in suites:
                option = "--rewards" if name == "rewards_file" else "--" + name.replace("_", "-")
                raise UserError(f"{option}: it goes with --suite {' or '.join(suites)}, not with {suite}.")


def make_suite(
    suite: str,
    given: SuiteOptions,
    *,
    target: str,
    num_images: int | None,
    seed: int,
    allow_imports: Collection[str] = (),
) -> Suite:
    """The suite; UserError for options that it cannot be made from.

    A run folder as `target` is measured by its own rewards and on its own prompts where none are given.
    """
    given.check(suite)
    if suite == "geneval":
        from agsm_rl.evaluate.suites.geneval import CLASSIFIER, DETECTOR, GenEval

        return GenEval(detector=given.detector or DETECTOR, classifier=given.classifier or CLASSIFIER)
    if suite == "rewards":
        from agsm_rl.evaluate.suites.rewards import Rewards, parse_rewards, rewards_of
        from agsm_rl.evaluate.suites.shapes import suite_prompts

        named = given.reward or given.rewards_file
        own = None if named and given.prompts else _own_evaluation(Path(target))
        prompts, where = _prompts(given, num_images), str(Path(target) / "recipe.yaml")
        if own is not None and not prompts:
            texts = suite_prompts(own.split, num_images or own.num_images, own.seed)
            prompts = {index: {"prompt": text} for index, text in enumerate(texts)}
        specs = (
            rewards_of(own, where=where, allow_imports=allow_imports)
            if own is not None and own.rewards and not named
            else parse_rewards(given.reward or (), given.rewards_file, allow_imports=allow_imports)
        )
        return Rewards(specs, prompts, allow_imports=allow_imports)
    if suite == "fid":
        from agsm_rl.evaluate.suites.fid import FID

        if given.reference is None:
            raise UserError("--suite fid: give the folder of real images to compare with by --reference.")
        return FID(given.reference, _prompts(given, num_images), weights=given.inception)
    from agsm_rl.evaluate.suites.shapes_images import Shapes

    return Shapes(split=given.split or "held_out", num_images=num_images or 600, seed=seed)


def _own_evaluation(target: Path) -> Evaluate | None:
    """What a run folder's recipe evaluates."""
    file = target / "recipe.yaml"
    if not file.is_file():
        return None
    from agsm_rl.recipe.options import explain
    from agsm_rl.recipe.schema import Evaluate
    from agsm_rl.recipe.yaml_file import read_yaml

    try:
        said = read_yaml(file).get("evaluate")
        return None if said is None else Evaluate.model_validate(said)
    except ValidationError as error:
        raise explain(error, where=f"{file}: evaluate") from error


def _prompts(given: SuiteOptions, num_images: int | None) -> Mapping[int, Mapping[str, Any]]:
    """The prompts; none where the target is a folder of images, which has its own."""
    if given.prompts is None:
        return {}
    return read_prompts(given.prompts, column=given.prompt_column, split=given.prompt_split, limit=num_images)

"""Turns the options of `agsm-rl eval` into a suite; options that do not go together are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.evaluate.prompts import read_prompts
from agsm_rl.evaluate.stored_suite import StoredSuite as Suite

if TYPE_CHECKING:
    from agsm_rl.recipe.schema import Evaluate

SUITES = ("shapes", "geneval", "rewards", "fid")
# The suites that each suite-specific option goes with.
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
    """Options that belong to single suites; None or empty if they are not given."""

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
        """UserError for an unknown suite, or for an option that does not belong to it."""
        if suite not in SUITES:
            raise unknown_name("--suite", suite, "a suite", SUITES)
        for name, suites in GOES_WITH.items():
            if getattr(self, name) and suite not in suites:
                option = "--rewards" if name == "rewards_file" else "--" + name.replace("_", "-")
                raise UserError(f"{option}: goes with --suite {' or '.join(suites)}, not with {suite}.")


def make_suite(
    suite: str,
    given: SuiteOptions,
    *,
    target: str,
    num_images: int | None,
    seed: int,
    allow_imports: Collection[str] = (),
) -> Suite:
    """The suite; UserError if its options are not usable.

    If `target` is a run folder, the rewards suite defaults to the run's own rewards and prompts.
    """
    given.check(suite)
    if suite == "geneval":
        from agsm_rl.evaluate.suites.geneval import CLASSIFIER, DETECTOR, GenEval

        return GenEval(detector=given.detector or DETECTOR, classifier=given.classifier or CLASSIFIER)
    if suite == "rewards":
        from agsm_rl.evaluate.suites.rewards import Rewards, parse_rewards, rewards_of
        from agsm_rl.evaluate.suites.shapes import suite_prompts

        named = given.reward or given.rewards_file
        of_run = None if named and given.prompts else _evaluation_of_run(Path(target))
        prompts, where = _prompts(given, num_images), str(Path(target) / "recipe.yaml")
        if of_run is not None and not prompts:
            texts = suite_prompts(of_run.split, num_images or of_run.num_images, of_run.seed)
            prompts = {index: {"prompt": text} for index, text in enumerate(texts)}
        specs = (
            rewards_of(of_run, where=where, allow_imports=allow_imports)
            if of_run is not None and of_run.rewards and not named
            else parse_rewards(given.reward or (), given.rewards_file, allow_imports=allow_imports)
        )
        return Rewards(specs, prompts, allow_imports=allow_imports)
    if suite == "fid":
        from agsm_rl.evaluate.suites.fid import FID

        if given.reference is None:
            raise UserError("--suite fid: give the folder of real images to compare with as --reference.")
        return FID(given.reference, _prompts(given, num_images), weights=given.inception)
    from agsm_rl.evaluate.suites.shapes_images import Shapes

    return Shapes(split=given.split or "held_out", num_images=num_images or 600, seed=seed)


def _evaluation_of_run(target: Path) -> Evaluate | None:
    """The `evaluate` section of a run folder's recipe; None if there is none."""
    file = target / "recipe.yaml"
    if not file.is_file():
        return None
    from agsm_rl.recipe.options import explain
    from agsm_rl.recipe.schema import Evaluate
    from agsm_rl.recipe.yaml_file import read_yaml

    try:
        section = read_yaml(file).get("evaluate")
        return None if section is None else Evaluate.model_validate(section)
    except ValidationError as error:
        raise explain(error, where=f"{file}: evaluate") from error


def _prompts(given: SuiteOptions, num_images: int | None) -> Mapping[int, Mapping[str, Any]]:
    """The prompts; none if the target is a folder of images, which brings its own."""
    if given.prompts is None:
        return {}
    return read_prompts(given.prompts, column=given.prompt_column, split=given.prompt_split, limit=num_images)

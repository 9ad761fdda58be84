"""One model measured on one suite of a recipe at one guidance, and base against trained in the form of eval.json."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings
from agsm_rl.evaluate.measure import draw_and_judge
from agsm_rl.evaluate.suite import Judged, Result, Suite
from agsm_rl.evaluate.suites.rewards import Rewards, RewardsResult
from agsm_rl.interfaces import Adapter, Backbone
from agsm_rl.policy import using
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import UNKNOWN_BATCH, Evaluate
from agsm_rl.recipe.suites import MadeSuite, make_suites
from agsm_rl.training.guidance import guiding
from agsm_rl.training.processes import Processes
from agsm_rl.training.sizes import Resolution, check_drawable, drawing_at


@dataclass(frozen=True)
class Entry:
    """A suite of a recipe, and the rewards that are measured on its images beside it."""

    made: MadeSuite
    rewards: Rewards | None = None

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.made.name

    @property
    def suites(self) -> list[Suite]:
        """What judges its images."""
        return [self.made.suite, *([self.rewards] if self.rewards is not None else [])]

    def read_prompts(self) -> Mapping[int, Mapping[str, Any]]:
        """The prompts by number; UserError where they cannot be read, or lack what the suite judges by."""
        prompts = self.made.suite.prompts()
        for suite in self.suites:
            for metadata in prompts.values():
                suite.check(metadata)
        return prompts

    def resolution(self, options: Evaluate) -> Resolution | None:
        """The size that its images are drawn at; None: the backbone's own."""
        return None if self.made.suite.keeps_size else options.resolution

    def prepare(self, backbone: Backbone, options: Evaluate) -> None:
        """Read the prompts, load what judges and have it judge a grey picture; UserError for what is missing."""
        first = next(iter(self.read_prompts().values()))
        wanted = self.resolution(options) or backbone.resolution
        size = check_drawable(backbone, wanted, where="evaluate.resolution")
        grey = new_image("RGB", (size.width, size.height), (128, 128, 128))
        for suite in self.suites:
            suite.prepare()
            suite.judge([grey], [str(first["prompt"])], [first])

    def is_reward(self, score: str) -> bool:
        """Whether one of its scores is a reward's mean."""
        return isinstance(self.made.suite, Rewards) or score not in self.made.suite.score_names()


def entries_of(evaluate: Evaluate, parts: Parts, place: str = "evaluate") -> list[Entry]:
    """The suites of a completed evaluation, in the recipe's order."""
    made = make_suites(evaluate, parts, place)
    if evaluate.resolution is not None and all(item.suite.keeps_size for item in made):
        names = ", ".join(item.name for item in made)
        raise UserError(
            f"{parts.at(f'{place}.resolution')}: got {evaluate.resolution}, but {names} is judged at the base's own "
            "resolution only; leave it out, or add a suite of rewards"
        )
    return [Entry(item, Rewards(rewards=item.rewards) if item.rewards else None) for item in made]


@dataclass
class Measured:
    """One model's figures on a suite at one guidance.

    Attributes:
        entry: The suite.
        guidance: Strength of classifier-free guidance.
        result: The suite's result.
        rewards: Mean of each reward that was measured beside it.
        pictures: The first images, by their row in eval.json's `images`.
        judged: Each suite's rows; empty where an earlier version kept results only.
    """

    entry: Entry
    guidance: float
    result: Result
    rewards: dict[str, float] = field(default_factory=dict)
    pictures: dict[int, Image] = field(default_factory=dict)
    judged: list[list[Judged]] = field(default_factory=list)

    @property
    def reward_result(self) -> RewardsResult | None:
        """The result of the rewards beside the suite; None if there are none, or only their means were kept."""
        return self.entry.rewards.result(self.judged[1]) if self.entry.rewards and len(self.judged) > 1 else None

    def scores(self) -> dict[str, float]:
        """The suite's scores and the rewards' means, by their own names."""
        return {name: part.value for name, part in self.result.scores().items()} | self.rewards

    def means(self) -> dict[str, float]:
        """The same under the names that a recipe's rules use."""
        return {self.entry.made.key(name): value for name, value in self.scores().items()}

    def per_image(self) -> dict[str, Tensor]:
        """The figure of each image [N] for scores that are means over images, under the rules' names."""
        figures = dict(self.result.per_image())
        figures |= {} if self.reward_result is None else self.reward_result.per_image()
        return {self.entry.made.key(name): torch.tensor(values) for name, values in figures.items()}

    def figures(self) -> dict[str, float]:
        """The scores under the names of a line of evaluations.jsonl."""
        is_reward = self.entry.is_reward
        return {f"reward/{name}" if is_reward(name) else name: value for name, value in self.scores().items()}

    def to_json(self) -> dict[str, Any]:
        """An entry of eval.json, without the base."""
        content = self.result.to_json() | {"guidance": self.guidance, "rewards": self.rewards}
        content["images"] = without_files(content["images"])
        if len(self.judged) > 1 and len(content["images"]) == len(self.judged[1]):
            rows = zip(content["images"], self.judged[1], strict=True)
            content["images"] = [{**row, "rewards": item.row} for row, item in rows]
        return content


def without_files(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of images that are not kept, whose file names lead nowhere."""
    return [{key: value for key, value in row.items() if key != "filename"} for row in rows]


Compared = tuple[Measured, Measured]
"""The base and the trained model on the same suite at the same guidance."""


@contextmanager
def drawn_as(adapters: Collection[Adapter], options: Evaluate, *, where: str = "evaluate.") -> Iterator[None]:
    """Within the block, adapters draw with the bank and the form of guidance that an evaluation asks for."""
    with using(adapters, options.bank), guiding(adapters, options.guidance_bank, options.guidance_prompt, where=where):
        yield


def measure(
    backbone: Backbone,
    entry: Entry,
    options: Evaluate,
    guidance: float,
    *,
    processes: Processes | None = None,
    check: Callable[[], None] = lambda: None,
    advance: Callable[[int], None] = lambda number: None,
) -> Measured:
    """Draw and judge a suite with the backbone as it is, adapters on or off; see measure.draw_and_judge."""
    how = drawing_settings(options, guidance)
    with drawing_at(backbone, entry.resolution(options), where="evaluate.resolution"):
        drawn = draw_and_judge(backbone, entry.suites, how, processes=processes, check=check, advance=advance)
    return from_rows(entry, guidance, drawn.judged, drawn.pictures)


def drawing_settings(options: Evaluate, guidance: float) -> DrawingSettings:
    """How an evaluation draws at one guidance."""
    return DrawingSettings(
        seed=options.seed,
        guidance=guidance,
        num_steps=options.num_steps,
        batch_size=options.batch_size or UNKNOWN_BATCH,
        prompt_suffix=options.prompt_suffix,
    )


def from_rows(
    entry: Entry, guidance: float, judged: list[list[Judged]], pictures: Mapping[tuple[int, int], Image]
) -> Measured:
    """The measurement that these rows make; `pictures` are by the numbers of the prompt and of the image."""
    result = entry.made.suite.result(judged[0])
    means = {}
    if entry.rewards is not None:
        means = {name: part.value for name, part in entry.rewards.result(judged[1]).scores().items()}
    keys = [(item.prompt_index, item.number) for item in judged[0]]
    if isinstance(result, RewardsResult):  # a row per prompt, whose first picture is kept
        keys = [(index, 0) for index in result.prompts]
    rows = {key: number for number, key in enumerate(keys)}
    shown = {rows[key]: picture for key, picture in pictures.items() if key in rows}
    return Measured(entry, guidance, result, means, dict(sorted(shown.items())), judged)


def to_json(suites: Mapping[str, Sequence[Compared]], options: Evaluate, *, step: int | None = None) -> dict[str, Any]:
    """eval.json: the first suite at the first guidance on top, then its other guidances, then all suites."""
    entries = {name: [_entry(*compared) for compared in of_suite] for name, of_suite in suites.items()}
    first = next(iter(entries.values()))
    settings: dict[str, Any] = {"seed": options.seed, "num_steps": options.num_steps}
    settings |= {"bank": options.bank, "prompt_suffix": options.prompt_suffix}
    form = {"guidance_bank": options.guidance_bank, "guidance_prompt": options.guidance_prompt}
    settings |= {key: value for key, value in form.items() if value is not None}
    settings |= {} if options.resolution is None else {"resolution": options.resolution}
    settings |= {} if step is None else {"step": step}
    content = first[0] | settings | ({"other_guidances": first[1:]} if first[1:] else {})
    if options.suites is not None:
        uses = {name: block.use for name, block in options.suites.items()}
        content["suites"] = {name: {"use": uses[name], "guidances": rows} for name, rows in entries.items()}
    return content


def _entry(base: Measured, trained: Measured) -> dict[str, Any]:
    entry = trained.to_json() | {"base": base.to_json()} | trained.result.against(base.result)
    before, after = base.reward_result, trained.reward_result
    if before is not None and after is not None:
        entry["reward_changes"] = after.against(before)["rewards"]
    return entry

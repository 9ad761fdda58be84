"""What a suite is: prompts to draw, a judgement of each picture, and a result made of the judgements.

`agsm-rl train`, `eval` and `sweep` all measure through this class, and a suite never knows which of them does. Whoever
measures draws the suite's prompts, turns each image into the 8-bit picture that a user would save, has it judged, keeps
the rows (in memory, beside pictures in a folder, or gathered from several processes), and makes a result of all rows:

    rows = suite.judge(pictures, prompts, metadata)                       # plain JSON, one row per picture
    result = suite.result([Judged(number, 0, metadata, row), …])          # figures, tables, differences

Suites are registered like rewards and objectives (registry.py, entry points of the group `agsm_rl.suites`). The
constructor's signature is the schema of `{use: name, …}` in a recipe's `evaluate.suites`; all its arguments are
keyword-only. Three names have one meaning everywhere: `num_images`, `rewards` (given to the constructor as RewardSpecs)
and `seed` (null: the evaluation's). A constructor checks its arguments and loads nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from PIL.Image import Image
from rich.console import Console
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw
from agsm_rl.evaluate.intervals import Interval
from agsm_rl.interfaces import Backbone

Row = Any
"""What a suite says of one picture, as plain JSON."""
Metadata = Mapping[str, Any]
"""A prompt's row: `prompt`, its text, and any other columns."""
Judge = Callable[[Sequence[Image], Sequence[str], Sequence[Metadata]], list[Row]]


@dataclass(frozen=True)
class Asked:
    """One picture of a suite, drawn or yet to be drawn: its prompt's number and row, and its number among those."""

    prompt_index: int
    number: int
    metadata: Metadata

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        return str(self.metadata["prompt"])


@dataclass(frozen=True)
class Judged:
    """One picture of a suite and the row that it was given.

    Attributes:
        prompt_index: The prompt's number in `Suite.prompts()`.
        number: The picture's number among those of its prompt, from 0.
        metadata: The prompt's row.
        row: What the suite said.
        filename: The picture's file; None if it was not kept.
    """

    prompt_index: int
    number: int
    metadata: Metadata
    row: Row
    filename: str | None = None

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        return str(self.metadata["prompt"])


@dataclass(frozen=True)
class Part:
    """A part of a suite's rows that is judged and kept by itself, such as one of several rewards.

    Attributes:
        folder: Name of the folder for its rows, beside `samples` (image_folder.py).
        how: What its rows depend on besides the picture and its prompt: models and options.
        judge: Judges pictures; their sizes may differ.
        of_today: Translates the `how` of an earlier version; raises UserError if it no longer means anything.
    """

    folder: str
    how: Mapping[str, Any]
    judge: Judge
    of_today: Callable[[Any], Mapping[str, Any]] = lambda how: how


class Result(Protocol):
    """The figures of one model on a suite. It holds a figure per picture, so that two results can be paired."""

    def scores(self) -> Mapping[str, Interval]:
        """The scores that rules and tables may use, under the suite's `score_names()`; an unknown bound is nan."""
        ...

    def per_image(self) -> Mapping[str, Sequence[float]]:
        """Of those that are means over pictures: the figure of each picture, in the order of the pictures."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json: suite, num_images, overall, tags and images (one row per picture), at least."""
        ...

    def show(self, console: Console, other: Self | None = None, *, labels: tuple[str, str] = ("other", "this")) -> None:
        """Print the table; with `other`, both results, other first under labels[0], and their paired difference."""
        ...

    def against(self, other: Self) -> dict[str, Any]:
        """This minus the other, paired, with `difference` among the keys; UserError if their prompts differ."""
        ...


class Suite(ABC):
    """The base class of all suites.

    Attributes:
        name: The registered name.
        num_images: How many pictures are drawn: the first of each prompt, then the second of each, and so on.
        folder: Name of the folder that keeps the rows beside pictures; by default the suite's name.
        smaller_is_better: The scores, of `score_names()`, of which less is better.
        needs_prompts: Whether a row depends on the prompt; if not, a folder of pictures without prompts can be judged.
        only_draws: The options that decide which images are drawn, and nothing of how they are judged or reported:
            `agsm-rl eval` refuses them for images that exist.
        keeps_size: Whether its pictures are always drawn at the base's own resolution, whatever `evaluate` says.

    A class that runs a command, or sends pictures or keys to a host, has a static method `permissions(options)`
    (registry.py).
    """

    name: str
    num_images: int
    folder: str = ""
    smaller_is_better: frozenset[str] = frozenset()
    needs_prompts: bool = True
    only_draws: frozenset[str] = frozenset({"seed"})
    keeps_size: bool = False

    @abstractmethod
    def prompts(self) -> Mapping[int, Metadata]:
        """The prompts by number, {"prompt": text, …}; UserError if there are none, or their file cannot be read."""

    @abstractmethod
    def judge(self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Row]:
        """One row per picture, as plain JSON.

        `images` are 8-bit RGB and may differ in size. A row depends on its picture, its prompt and `how()` only.
        """

    @abstractmethod
    def result(self, judged: Sequence[Judged]) -> Result:
        """The result of all pictures, in the order in which they were planned."""

    def score_names(self) -> Sequence[str]:
        """The names that `checkpoint.best`, `stop_when` and sweeps may use, known before anything is drawn."""
        return ("overall",)

    def how(self) -> Mapping[str, Any]:
        """What a row depends on besides the picture and its prompt (models, options). Kept rows are keyed by it."""
        return {}

    def parts(self) -> Sequence[Part]:
        """The parts that are judged and kept by themselves; by default the whole row is one."""
        return [Part(self.folder or self.name, self.how(), self.judge)]

    def join(self, rows: Sequence[Row]) -> Row:
        """The row of a picture from those of its parts; by default the only one."""
        return rows[0]

    def prepare(self) -> None:
        """Load what judges, before hours are spent on drawing; UserError for missing weights. May be called again."""
        return None

    def check(self, metadata: Metadata) -> None:
        """UserError, which does not name the file, if a prompt's row lacks what the suite judges by."""
        return None

    def check_base(self, backbone: Mapping[str, Any]) -> None:
        """UserError, saying what to write instead, if the suite makes no sense on a base.

        `backbone` are the options of its block, such as `checkpoint`. Nothing is loaded, and no hub is asked.
        """
        return None

    def read_results(self, file: Path) -> Result:
        """The result in a .jsonl file of verdicts, by this or another tool; by default UserError: there is no form."""
        raise UserError(f"{file}: the suite {self.name} does not read results; give a folder of images.")

    def write_results(self, result: Any, folder: Path) -> None:
        """Write a result beside the pictures it is of, in a form that other tools read; by default nothing."""
        return None

    def draw(
        self,
        backbone: Backbone,
        prompts: Sequence[str],
        seeds: Sequence[int],
        metadata: Sequence[Metadata],
        *,
        guidance: float,
        num_steps: int,
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] on the CPU; by default what the backbone draws for the prompts.

        `prompts` have the evaluation's `prompt_suffix`. Image i depends on prompts[i], seeds[i] and metadata[i] only.
        """
        return draw(backbone, prompts, seeds, guidance=guidance, num_steps=num_steps, batch_size=max(1, len(prompts)))


def batches_of_one_size(shapes: Sequence[tuple[int, ...]], size: int) -> list[list[int]]:
    """The numbers of things of these shapes in batches of at most `size`, each of one shape, for judges that stack."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

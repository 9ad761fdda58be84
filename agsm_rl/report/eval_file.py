"""eval.json, a run's or that of `agsm-rl eval --json`: every suite in it, base and trained model, at each guidance.

What holds a figure per image can be paired; of the rest, the figures are shown as they are in the file. A form that
nothing can be read from is named in a note, and a file of a known form that is damaged is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from agsm_rl.errors import UserError
from agsm_rl.files import read_json
from agsm_rl.report.compare import Layout
from agsm_rl.report.eval_rows import Image, Judged, Score, images_of, judged_of, scores_of
from agsm_rl.report.figures import Figure, figures_of
from agsm_rl.report.requirements import requirements_of

PROMPTS_OF = {"geneval": "GenEval"}
"""Suites that have one set of prompts: what these are called."""
KNOWN = ("shapes", "scenes", "geneval", "rewards")
"""Suites whose rows have a known form: what does not have it is damaged."""
NOT_RECORDED = -1.0
"""The guidance of images that another tool drew without recording it."""
FAULTS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class EvalFile:
    """One suite's figures per image. `base` and `trained` are by guidance, in the file's order; `base` may be empty.

    `prompts` and `tags` have one entry per image; `tag_names` are the tags in the suite's order. `prompt_suffix` was
    read behind each prompt, `bank` is what the trained model drew with, and `guidance_form` the bank and the prompt of
    its unconditional branch, where the evaluation chose them. `adapters`: the SHA-256 of its files, if recorded.
    `first_of_run`: whether a run keeps its pictures where it keeps those of its first suite.
    """

    suite: str
    split: str
    seed: int | None
    num_steps: int | None
    prompt_suffix: str
    bank: str
    images: tuple[Image, ...]
    tag_names: tuple[str, ...]
    scores: dict[str, Score]
    base: dict[float, Judged]
    trained: dict[float, Judged]
    step: int | None
    agreement: tuple[str, ...]
    adapters: dict[str, str] = field(default_factory=dict)
    guidance_form: tuple[str | None, str | None] = (None, None)
    first_of_run: bool = True

    @property
    def prompts(self) -> tuple[str, ...]:
        """Each image's prompt."""
        return tuple(image.prompt for image in self.images)

    @property
    def tags(self) -> tuple[str, ...]:
        """Each image's tag."""
        return tuple(image.tag for image in self.images)

    @cached_property
    def requirements(self) -> tuple[Hashable, ...] | None:
        """Each image's requirement; None for prompts outside the drawn worlds."""
        return requirements_of(self.suite, self.prompts)

    @property
    def layout(self) -> Layout:
        """What the images are of. A prompt outside the drawn worlds is its own requirement."""
        return Layout(self.tags, self.tag_names, self.prompts, self.requirements or self.prompts)

    @property
    def guidances(self) -> list[float]:
        """In the recipe's order."""
        return list(self.trained)

    @property
    def score_names(self) -> list[str]:
        """What its images are measured by, the one that counts first."""
        return list(self.scores)

    @property
    def labels(self) -> dict[str, str]:
        """What these are called."""
        return {name: score.label for name, score in self.scores.items()}

    def score(self, judged: Judged, name: str) -> float:
        """A share: the mean over tags. A number: the mean over prompts."""
        parts = self.tags if self.scores[name].share else self.prompts
        _, part_of = np.unique(parts, return_inverse=True)
        return float(np.mean(np.bincount(part_of, judged.values[name].astype(float)) / np.bincount(part_of)))


NOT_EVALUATED = EvalFile("", "", None, None, "", "positive", (), (), {}, {}, {}, None, ())
"""Of a run whose recipe evaluates nothing."""


@dataclass(frozen=True)
class Measured:
    """All that a file says of one model. `suites` are those with figures per image, `figures` what else is known.

    Attributes:
        suites: By the recipe's name of the suite; by its registered name where the recipe has but one.
        figures: (suite, figure) of what has no images to be paired.
        notes: What was not understood, and what a reader should know.
        other: What is measured beside the model, if that is not its base: its name, and the same of it.
        backbone: What the images were drawn with, if recorded.
    """

    suites: dict[str, EvalFile]
    figures: tuple[tuple[str, Figure], ...]
    notes: tuple[str, ...]
    other: tuple[str, Measured] | None = None
    backbone: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> EvalFile:
        """The first suite with figures per image."""
        return next(iter(self.suites.values()), NOT_EVALUATED)


def read_evaluation(path: Path) -> Measured:
    """Read an eval.json; UserError if it is damaged, or none."""
    content = read_json(path)
    try:
        return _measured(content, path)
    except FAULTS as error:
        raise UserError(
            f"{path}: is not an evaluation as `agsm-rl train` or `agsm-rl eval --json` writes it "
            f"({type(error).__name__}: {error!s:.200}); evaluate the run again."
        ) from error


def _measured(content: Mapping[str, Any], path: Path) -> Measured:
    suites: dict[str, EvalFile] = {}
    figures: list[tuple[str, Figure]] = []
    notes: list[str] = []
    content, other = _with_base(content, path)
    for place, (name, entries) in enumerate(_entries(content).items()):
        suite = _suite_if_known(entries, content, f"{path}: {name}", first=place == 0)
        if suite is not None:
            suites[name] = suite
            left_out = [one for judged in suites[name].trained.values() for one in judged.incomplete]
            notes += [
                f"{path}: {name}: {one} is left out: not every image has a finite figure."
                for one in dict.fromkeys(left_out)
            ]
            figures += [(name, one) for entry in entries for one in _means(entry, suites[name])]
        else:
            known = [(name, one) for entry in entries for one in figures_of(entry, _guidance(entry))]
            figures += known
            if not known:
                notes.append(f"{path}: the suite '{name}' is not understood: it has neither images nor figures.")
        constant = dict.fromkeys(str(one) for entry in entries for one in entry.get("constant") or [])
        notes += [
            f"{path}: {name}: {one} gave every image the same score; it measures nothing here." for one in constant
        ]
    backbone = (content.get("drawing") or {}).get("backbone") or {}
    return Measured(suites, tuple(figures), tuple(notes), other, backbone)


def _entries(content: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """A suite's entries, one per guidance, by its name."""
    if content.get("suites"):
        return {
            str(name): [{"suite": suite.get("use", name), **entry} for entry in suite["guidances"]]
            for name, suite in content["suites"].items()
        }
    return {str(content["suite"]): [content, *content.get("other_guidances", [])]}


def _with_base(content: Mapping[str, Any], path: Path) -> tuple[Mapping[str, Any], tuple[str, Measured] | None]:
    """The content with what `--against` measured as its base, if that is the base, or else apart from it."""
    other = content.get("other")
    if "base" in content or not other:
        return content, None
    if _is_the_base(other, content):
        return {**content, "base": other}, None
    return content, (str(other.get("target") or "other"), _measured({**content, **other, "other": None}, path))


def _suite_if_known(
    entries: Sequence[Mapping[str, Any]], content: Mapping[str, Any], where: str, *, first: bool
) -> EvalFile | None:
    """The suite's figures per image; None if it keeps none, or none that can be read."""
    if not entries[0].get("images"):
        return None
    try:
        return _suite(entries, content, where, first=first)
    except (UserError, *FAULTS):
        if str(entries[0].get("suite")) in KNOWN:
            raise
        return None


def _suite(entries: Sequence[Mapping[str, Any]], content: Mapping[str, Any], where: str, *, first: bool) -> EvalFile:
    trained = {_guidance(entry): judged_of(entry) for entry in entries}
    base = {_guidance(entry): judged_of(entry["base"]) for entry in entries if entry.get("base")}
    with_base = [entry["base"] for entry in entries if entry.get("base")]
    if base and len(base) < len(trained):
        raise UserError(f"{where}: does not measure the base at every guidance; evaluate the run again.")
    images, scores = images_of(entries[0]), scores_of(entries[0])
    if any(images_of(entry) != images for entry in [*entries, *with_base]):
        raise UserError(f"{where}: its guidances were measured on different prompts; evaluate the run again.")
    judged = [*base.values(), *trained.values()]
    for name in scores:
        if not all(name in one.values for one in judged) and not any(name in one.incomplete for one in judged):
            raise UserError(
                f"{where}: base and trained, or its guidances, have different scores; evaluate the run again."
            )
    scores = {name: score for name, score in scores.items() if all(name in one.values for one in judged)}
    if not scores:
        raise UserError(f"{where}: its images have neither a verdict nor a score; evaluate the run again.")
    entry, settings = entries[0], {**content, **entries[0]}
    suite, tags = str(entry["suite"]), [image.tag for image in images]
    return EvalFile(
        suite=suite,
        split=PROMPTS_OF.get(suite, str(entry.get("split") or "")),
        seed=_whole(settings.get("seed")),
        num_steps=_whole(settings.get("num_steps")),
        prompt_suffix=str(settings.get("prompt_suffix") or ""),
        bank=str(settings.get("bank") or "positive"),
        images=tuple(images),
        tag_names=tuple(dict.fromkeys([*(tag for tag in entry.get("tags") or {} if tag in tags), *tags])),
        scores=scores,
        base=base,
        trained=trained,
        step=_whole(settings.get("step")),
        agreement=tuple(str(one["sentence"]) for one in content.get("agreement") or []),
        adapters=_digests((content.get("drawing") or {}).get("adapters") or {}),
        guidance_form=(settings.get("guidance_bank"), settings.get("guidance_prompt")),
        first_of_run=first,
    )


def _means(entry: Mapping[str, Any], suite: EvalFile) -> Iterable[Figure]:
    """The mean rewards that the entry holds without a figure per image."""
    means = {"rewards": entry.get("rewards") or {}, "base": {"rewards": (entry.get("base") or {}).get("rewards") or {}}}
    return [one for one in figures_of(means, _guidance(entry)) if one.name not in suite.scores]


def _is_the_base(other: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    """Whether another target's images are the base's, drawn once for several runs from the same noise."""
    theirs, ours = other.get("drawing") or {}, content.get("drawing") or {}
    return (
        content.get("same_noise") is True
        and theirs.get("adapters") == {}
        and _loaded(theirs) == _loaded(ours)
        and all(theirs.get(key) == ours.get(key) for key in ("guidance", "num_steps", "prompt_suffix", "dtype"))
    )


def _loaded(drawing: Mapping[str, Any]) -> dict[str, Any]:
    """What a backbone was loaded from; `use` may say the same in two ways, and what is null or off need not be said."""
    block = drawing.get("backbone", {})
    return {key: value for key, value in block.items() if value not in (None, False) and key != "use"}


def _guidance(entry: Mapping[str, Any]) -> float:
    if entry.get("guidance") is None:
        return NOT_RECORDED
    number = float(entry["guidance"])
    if not math.isfinite(number):
        raise ValueError(f"{entry['guidance']} is not a guidance")
    return number


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _digests(adapters: Mapping[str, Any]) -> dict[str, str]:
    """Of files in adapter/; a name that leads elsewhere is refused."""
    for name in adapters:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of an adapter's file")
    return {name: str(digest) for name, digest in adapters.items()}

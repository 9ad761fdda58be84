"""eval.json as arrays: whether each image is right, for base and trained model, at each guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agsm_rl.errors import UserError
from agsm_rl.files import read_json

VERDICTS = {"strict": "exactly right (strict)", "correct": "right (lenient)"}
"""The judge's verdicts by their key in eval.json, the one that counts first."""
OF_SUITE = {"geneval": ("GenEval", {"correct": "right (by GenEval's rules)"})}
"""Suites that have one set of prompts and one verdict: what these are called."""

Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """One model's images at one guidance: a mark an image by each verdict, the judge's reasons, mean rewards.

    `files` are the images' own, where the evaluation says them.
    """

    marks: dict[str, Marks]
    reasons: tuple[str, ...]
    rewards: dict[str, float]
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalFile:
    """What an eval.json says. `base` and `trained` are by guidance, in the file's order.

    `prompts` and `tags` are an image's each; `tag_names` are the tags in the suite's order. `prompt_suffix` was read
    behind each prompt, `bank` is what the trained model drew with, and `guidance_form` the bank and the prompt of its
    unconditional branch, where the evaluation chose them. `adapters`: the SHA-256 of its files, where told.
    """

    suite: str
    split: str
    seed: int
    num_steps: int
    prompt_suffix: str
    bank: str
    prompts: tuple[str, ...]
    tags: tuple[str, ...]
    tag_names: tuple[str, ...]
    base: dict[float, Judged]
    trained: dict[float, Judged]
    step: int | None
    agreement: tuple[str, ...]
    adapters: dict[str, str] = field(default_factory=dict)
    guidance_form: tuple[str | None, str | None] = (None, None)

    def score(self, judged: Judged, verdict: str) -> float:
        """Share right, the mean over tags."""
        tags = np.array(self.tags)
        return float(np.mean([judged.marks[verdict][tags == name].mean() for name in self.tag_names]))

    @property
    def guidances(self) -> list[float]:
        """In the recipe's order."""
        return list(self.trained)

    @property
    def verdicts(self) -> list[str]:
        """Those that the suite gives."""
        return [name for judged in list(self.trained.values())[:1] for name in judged.marks]

    @property
    def labels(self) -> dict[str, str]:
        """What these are called."""
        names = OF_SUITE[self.suite][1] if self.suite in OF_SUITE else VERDICTS
        return {name: names[name] for name in self.verdicts}


NOT_EVALUATED = EvalFile("", "", 0, 0, "", "positive", (), (), (), {}, {}, None, ())
"""Of a run whose recipe evaluates nothing."""


def read_eval_file(path: Path) -> EvalFile:
    """Read an eval.json of base against trained; UserError that says what it lacks."""
    content = read_json(path)
    try:
        evaluation = _evaluation(content, path)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path}: is not an evaluation of base against trained as `agsm-rl train` writes it "
            f"({type(error).__name__}: {error!s:.200}); evaluate the run again."
        ) from error
    judged = [*evaluation.base.values(), *evaluation.trained.values()]
    if any(list(one.marks) != evaluation.verdicts for one in judged):
        raise UserError(f"{path}: base and trained, or its guidances, have different verdicts; evaluate the run again.")
    return evaluation


def _evaluation(content: Mapping[str, Any], path: Path) -> EvalFile:
    names = OF_SUITE[str(content["suite"])][1] if content["suite"] in OF_SUITE else VERDICTS
    if not content.get("images") or not any(name in content["images"][0] for name in names):
        raise UserError(
            f"{path}: its suite {content.get('suite')!r} has no verdict per image, so nothing can be paired. A report "
            "needs an evaluation of the suite shapes or geneval with `images` in it."
        )
    if "base" not in content and _is_the_base(content.get("other", {}), content):
        content = {**content, "base": content["other"]}
    if "base" not in content:
        raise UserError(
            f"{path}: it does not measure the base too. A report needs base against trained on the same prompts and "
            "noise, as `agsm-rl train`, `agsm-rl eval --compare --json`, or `--against` the base's images write it."
        )
    entries = [content, *content.get("other_guidances", [])]
    trained = {_finite(entry["guidance"]): _judged(entry, names) for entry in entries}
    base = {_finite(entry["guidance"]): _judged(entry["base"], names) for entry in entries}
    asked = _asked(content)
    for entry in entries:
        if _asked(entry) != asked or _asked(entry["base"]) != asked:
            raise UserError(f"{path}: its guidances were measured on different prompts; evaluate the run again.")
    asked_tags, suite = [tag for _, tag in asked], str(content["suite"])
    return EvalFile(
        suite=suite,
        split=OF_SUITE[suite][0] if suite in OF_SUITE else str(content["split"]),
        seed=int(content["seed"]),
        num_steps=int(content["num_steps"]),
        prompt_suffix=str(content.get("prompt_suffix", "")),
        bank=str(content.get("bank", "positive")),
        prompts=tuple(prompt for prompt, _ in asked),
        tags=tuple(asked_tags),
        tag_names=tuple(dict.fromkeys([*(tag for tag in content["tags"] if tag in asked_tags), *asked_tags])),
        base=base,
        trained=trained,
        step=None if content.get("step") is None else int(content["step"]),
        agreement=tuple(str(one["sentence"]) for one in content.get("agreement", [])),
        adapters=_digests((content.get("drawing") or {}).get("adapters", {})),
        guidance_form=(content.get("guidance_bank"), content.get("guidance_prompt")),
    )


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
    """What a backbone was loaded from; `use` may say the same in two ways, and what is null is not said by all."""
    return {key: value for key, value in drawing.get("backbone", {}).items() if value is not None and key != "use"}


def _asked(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The prompts with their tags, in order."""
    return [(str(row["prompt"]), str(row["tag"])) for row in entry["images"]]


def _judged(entry: Mapping[str, Any], names: Mapping[str, str]) -> Judged:
    rows = entry["images"]
    marks = {name: np.array([_mark(row[name]) for row in rows]) for name in names if name in rows[0]}
    reasons = tuple(str(row.get("reason", "")) for row in rows)
    rewards = {str(name): float(value) for name, value in entry.get("rewards", {}).items()}
    rewards = {name: value for name, value in rewards.items() if math.isfinite(value)}  # others have no place in a plot
    files = tuple(str(row["filename"]) for row in rows if "filename" in row)
    return Judged(marks, reasons, rewards, files if len(files) == len(rows) else ())


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not a guidance")
    return number


def _digests(adapters: Mapping[str, Any]) -> dict[str, str]:
    """Of files in adapter/; a name that leads elsewhere is refused."""
    for name in adapters:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of an adapter's file")
    return {name: str(digest) for name, digest in adapters.items()}


def _mark(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"a verdict is true or false, not {value!r}")
    return value

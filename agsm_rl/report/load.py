"""Runs, evaluations and sweeps as a report compares them: variants over seeds, suite by suite, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agsm_rl.errors import UserError
from agsm_rl.recipe.earlier import with_first_defaults
from agsm_rl.report.eval_file import NOT_EVALUATED, EvalFile
from agsm_rl.report.figures import Figure
from agsm_rl.report.runs import Run, SweepCell, is_sweep, read_runs, read_sweep
from agsm_rl.run.folder import seed_suffix

HOW_COMPUTED = ("device", "dtype", "gradient_checkpointing", "local_files_only", "memory_format", "compile")
"""A backbone's options that say how it is computed; a note says what this changes in the base's images."""
WATCHING = ("evaluate", "sample", "checkpoint", "track")
"""A recipe's keys that do not alter what is trained."""
ROUNDING = 1e-3
"""By this share a reward of the same image may differ between machines."""


@dataclass(frozen=True)
class Variant:
    """Runs of one recipe over seeds, in the seeds' order."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs."""
        return tuple(run.seed for run in self.runs)

    @property
    def has_base(self) -> bool:
        """Whether the base was measured beside each of its runs."""
        return all(run.evaluation.base for run in self.runs)


@dataclass(frozen=True)
class Loaded:
    """All that a report is made of, looked at through one suite, at first the first one; `of` gives the others.

    Attributes:
        title: The sweep's name, or the variants'.
        all_runs: The runs of all suites.
        cells: What became of a sweep's cells.
        suite: The name of the suite that is looked at; empty if there is none with figures per image.
        variants: Those whose runs it measured.
        guidances: Those at which it measured every run.
        notes: What a reader should know of its figures.
    """

    title: str
    all_runs: tuple[Run, ...]
    cells: tuple[SweepCell, ...]
    suite: str
    variants: tuple[Variant, ...]
    guidances: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """The runs of the variants."""
        return [run for variant in self.variants for run in variant.runs]

    @property
    def all_variants(self) -> tuple[Variant, ...]:
        """The variants of all suites."""
        return _variants(self.all_runs)

    @property
    def evaluated(self) -> bool:
        """Whether there are figures per image; otherwise there are only curves and single figures."""
        return self.evaluation is not NOT_EVALUATED

    @property
    def evaluation(self) -> EvalFile:
        """The first run's: its prompts, split, seed and scores are everybody's."""
        return self.runs[0].evaluation

    @property
    def has_base(self) -> bool:
        """Whether the base was measured beside any variant."""
        return any(variant.has_base for variant in self.variants)

    @property
    def suites(self) -> list[str]:
        """All suites with figures per image, in the runs' order."""
        return list(dict.fromkeys(name for run in self.all_runs for name in run.suites))

    @property
    def figures(self) -> list[tuple[Run, str, Figure]]:
        """(run, suite, figure) of all that has no images to be paired."""
        return [(run, suite, figure) for run in self.all_runs for suite, figure in run.figures]

    def of(self, suite: str) -> Loaded:
        """The same through a suite: the runs that it measured, and the scores that all of these have."""
        runs, notes = _alike([run.of(suite) for run in self.all_runs if suite in run.suites])
        missing = [run.name for run in self.all_runs if suite not in run.suites]
        notes += [f"{', '.join(missing)}: not measured on the suite {suite}."] if missing else []
        guidances = [one for one in runs[0].evaluation.guidances if all(one in run.evaluation.trained for run in runs)]
        notes += _notes(runs, guidances)
        return replace(self, suite=suite, variants=_variants(runs), guidances=tuple(guidances), notes=tuple(notes))


def load(paths: Sequence[Path]) -> Loaded:
    """Read run folders, evaluations' files, or one sweep; UserError says what cannot be used or compared, and why."""
    sweeps = [path for path in paths if is_sweep(path)]
    if sweeps and len(paths) > 1:
        raise UserError(f"{sweeps[0]}: is a sweep; give either one sweep, or run folders, not both.")
    if sweeps:
        return _loaded(*read_sweep(paths[0]))
    return load_runs([run for path in paths for run in read_runs(path)])


def load_runs(runs: Sequence[Run]) -> Loaded:
    """The same of runs that have been read; runs whose recipes differ only in the seed are one variant."""
    named = _named(list(runs))
    return _loaded(", ".join(dict.fromkeys(run.variant for run in named)), named, [])


def _loaded(title: str, runs: Sequence[Run], cells: Sequence[SweepCell]) -> Loaded:
    check_comparable(runs)
    loaded = Loaded(title, tuple(runs), tuple(cells), "", _variants(runs), (), ())
    return loaded.of(loaded.suites[0]) if loaded.suites else loaded


def _variants(runs: Sequence[Run]) -> tuple[Variant, ...]:
    names = dict.fromkeys(run.variant for run in runs)
    by_seed = sorted(runs, key=lambda run: run.seed)
    return tuple(Variant(name, tuple(run for run in by_seed if run.variant == name)) for name in names)


def _alike(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The runs with the scores that all of them have, and a note on the others."""
    common = [name for name in runs[0].evaluation.scores if all(name in run.evaluation.scores for run in runs)]
    left = dict.fromkeys(name for run in runs for name in run.evaluation.scores if name not in common)
    kept = [
        replace(run, evaluation=replace(run.evaluation, scores={name: run.evaluation.scores[name] for name in common}))
        for run in runs
    ]
    return kept, [f"Not every run was measured by {', '.join(left)}; it is left out."] if left else []


def with_text_keys(value: Any) -> Any:
    """YAML's data with every key as text, so that keys can be sorted and written as JSON."""
    if isinstance(value, Mapping):
        return {str(key): with_text_keys(item) for key, item in value.items()}
    return [with_text_keys(item) for item in value] if isinstance(value, list) else value


def _named(runs: list[Run]) -> list[Run]:
    """Runs of one recipe but for the seed are one variant, named by what their folders' names share."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        what = _but_for_seed(run) if run.file is None else {"file": str(run.file.resolve()), "model": run.name}
        groups.setdefault(json.dumps(with_text_keys(what), sort_keys=True, default=str), []).append(run)
    names: dict[str, str] = {}
    for key, members in groups.items():
        name, taken, count = _shared_name(members), set(names.values()), 1
        names[key] = name
        while names[key] in taken:
            count += 1
            names[key] = f"{name} ({count})"
    return [replace(run, variant=names[key]) for key, members in groups.items() for run in members]


def _but_for_seed(run: Run) -> dict[str, Any]:
    """What is measured. In a sweep, a cell that continues from another one continues from that of its own seed."""
    recipe = with_first_defaults(run.recipe)  # an option that came in later divides no runs
    kept = {key: value for key, value in recipe.items() if key not in ("seed", *WATCHING)}
    kept["bank"] = run.evaluation.bank
    kept["guidance_form"] = run.evaluation.guidance_form
    if kept.get("start_from"):
        kept["start_from"] = str(kept["start_from"]).removesuffix(seed_suffix(run.seed))
    return kept


def _shared_name(runs: list[Run]) -> str:
    """What is left without the seeds; or else what the names begin with alike."""
    if len(runs) == 1:
        return runs[0].name.removesuffix(seed_suffix(runs[0].seed))
    first, *others = [re.sub(rf"[-_. ]*(seed|s)?[-_. ]?{run.seed}$", "", run.name) for run in runs]
    shared = first if {first} == set(others) else os.path.commonprefix([run.name for run in runs]).rstrip("-_. ")
    return shared or " + ".join(str(term.get("use")) for term in runs[0].recipe.get("objectives", []))


def check_comparable(runs: Sequence[Run]) -> None:
    """UserError when runs cannot be paired image by image on the suites that they share, or are one run twice."""
    first = runs[0]
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        if run.evaluated != first.evaluated:
            without, other = (first, run) if run.evaluated else (run, first)
            raise UserError(
                f"{without.place}: was not evaluated, but {other.place} was. Evaluate it alike (`agsm-rl eval "
                f"{without.place} --suite … --compare --json {without.place}/eval.json`), or report it apart."
            )
        twin = seen.setdefault((run.variant, run.seed), run)
        if twin is not run:
            raise UserError(
                f"{run.place} and {twin.place}: are the same recipe with the same seed ({run.seed}); the same run "
                "twice would count as two. Leave one out."
            )
    for suite in dict.fromkeys(name for run in runs for name in run.suites):
        _check_pairs([run.of(suite) for run in runs if suite in run.suites])


def _check_pairs(runs: Sequence[Run]) -> None:
    """The same for the runs that a suite measured."""
    first = runs[0]
    for run in runs:
        unlike = difference(first.evaluation, run.evaluation)
        if unlike is None and first.file is run.file is None and _base(first) != _base(run):
            unlike = f"bases ({_base(first)} and {_base(run)})"
        if unlike is not None:
            raise UserError(
                f"{first.place} and {run.place}: were evaluated on different {unlike}, so their images cannot be "
                "paired. Report them apart, or evaluate them alike (evaluate.split, seed, num_images, num_steps, "
                "prompt_suffix)."
            )
    if not set.intersection(*(set(run.evaluation.trained) for run in runs)):
        found = "; ".join(f"{run.place}: {', '.join(f'{g:g}' for g in run.evaluation.guidances)}" for run in runs)
        raise UserError(f"the runs were evaluated at no common guidance ({found}); evaluate them alike.")
    if not set.intersection(*(set(run.evaluation.scores) for run in runs)):
        found = "; ".join(f"{run.place}: {', '.join(run.evaluation.scores)}" for run in runs)
        raise UserError(f"the runs were measured by no common score ({found}); evaluate them alike.")


SAME: dict[str, Callable[[EvalFile], Any]] = {
    "suites": lambda one: one.suite,
    "splits": lambda one: one.split,
    "noise seeds": lambda one: one.seed,
    "numbers of images": lambda one: len(one.prompts),
    "prompts": lambda one: one.images,
    "prompt suffixes": lambda one: f"“{one.prompt_suffix}”",
    "numbers of sampling steps": lambda one: one.num_steps,
}


def difference(one: EvalFile, other: EvalFile) -> str | None:
    """How two evaluations differ, so that their images cannot be paired; None if they can."""
    for what, of in SAME.items():
        if of(one) != of(other):
            return what if what == "prompts" else f"{what} ({of(one)} and {of(other)})"
    return None


def _base(run: Run) -> str:
    """What the backbone is made of: its checkpoint and what else decides what it draws, but for rounding."""
    block = run.recipe.get("backbone", {})
    own = {"use", "checkpoint", *HOW_COMPUTED}
    further = sorted((key, value) for key, value in block.items() if key not in own and value is not None)
    return str(block.get("checkpoint")) + "".join(f", {key}: {value}" for key, value in further)


def _notes(runs: Sequence[Run], guidances: Sequence[float]) -> list[str]:
    """What a reader should know of a suite's runs, in sentences."""
    notes = []
    left = sorted({one for run in runs for one in run.evaluation.trained} - set(guidances))
    if left:
        names = ", ".join(f"{one:g}" for one in left)
        notes.append(f"Not every run was evaluated at guidance {names}; there, variants are not compared.")
    name, score = next(iter(runs[0].evaluation.scores.items()))
    for guidance in guidances:
        drawn = [run.evaluation.base[guidance].values[name] for run in runs if guidance in run.evaluation.base]
        same = [base == drawn[0] if score.share else np.isclose(base, drawn[0], rtol=ROUNDING) for base in drawn]
        changed = [int((~one).sum()) for one in same]
        if max(changed, default=0):
            notes.append(
                f"At guidance {guidance:g} the runs' own drawings by the base differ in "
                f"{'the verdicts' if score.share else name} of up to {max(changed)} of {len(drawn[0])} images (other "
                "machine or libraries?); each is compared with its own."
            )
    return notes

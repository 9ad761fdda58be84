"""A study's primary endpoints: one difference for each question, written down before the runs, corrected by Holm.

    endpoints:
      - question: Does DDPO add to AGSM?
        variant: agsm_plus_ddpo      # of the sweep below, or sweep/variant of another one, beside a `sweep:`
        minus: agsm                  # default: the base
        sweep: complementarity       # its folder beside this file; default: the sweep that is reported
        guidance: own                # own (as chosen on validation prompts) or a number; default: the first view
        suite: shapes                # default: the first
        score: strict                # default: the suite's first
        tag: counting                # default: the mean over tags (of numbers: over prompts)
        seeds: 5                     # refuse to answer with fewer common seeds; default: take what there is
    questions: 6                     # how many were asked, also without an endpoint; default: as many as above

All p-values of a file are adjusted together (Holm, Scandinavian Journal of Statistics 1979, by statsmodels). A question
that was asked and can have no endpoint, say because its arm did not learn, counts with a p-value of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from agsm_rl.errors import UserError
from agsm_rl.evaluate.intervals_clustered import Clustered
from agsm_rl.recipe.options import Section, explain
from agsm_rl.recipe.yaml_file import read_yaml
from agsm_rl.report.eval_rows import Score
from agsm_rl.report.findings import find
from agsm_rl.report.load import Loaded, load_runs
from agsm_rl.report.runs import Run, read_runs
from agsm_rl.report.texts import change_text
from agsm_rl.report.views import BASE, OWN, make_views

LEVEL = 0.05
Read = Callable[[Path], Sequence[Run]]
"""Reads a run folder; it may keep what it has read."""


class Endpoint(Section):
    """What one question is answered by."""

    question: str
    variant: str
    minus: str = BASE
    sweep: str | None = None
    guidance: float | str | None = None
    suite: str | None = None
    score: str | None = None
    tag: str | None = None
    seeds: int = Field(1, ge=1)


class Study(Section):
    """A study's endpoints."""

    endpoints: list[Endpoint]
    questions: int | None = None


@dataclass(frozen=True)
class Answer:
    """An endpoint with its estimate and Holm's p-value."""

    endpoint: Endpoint
    what: str
    score: Score
    seeds: int
    change: Clustered
    holm: float

    @property
    def figures(self) -> tuple[str, str, str]:
        """The difference with its interval, its p-value, and Holm's."""
        return change_text(self.score, self.change), p_text(self.change.p_value), p_text(self.holm)

    @property
    def told_apart(self) -> bool:
        """Whether the study tells the two apart."""
        return self.holm < LEVEL

    @property
    def verdict(self) -> str:
        """Which way the study tells the two apart, if it does."""
        if not self.told_apart:
            return "not told apart"
        return "more" if self.change.value > 0 else "less"


def read_study(file: Path) -> Study:
    """What a file asks; UserError says what is wrong with it."""
    try:
        study = Study.model_validate(read_yaml(file, "study"))
    except ValidationError as error:
        raise explain(error, where=f"{file}: ") from error
    if not study.endpoints:
        raise UserError(f"{file}: endpoints: is empty; give at least one, or leave the file out.")
    if study.questions is not None and study.questions < len(study.endpoints):
        raise UserError(f"{file}: questions: got {study.questions}, but there are {len(study.endpoints)} endpoints.")
    return study


def answers(file: Path, reported: Loaded | None = None, read: Read = read_runs) -> list[Answer]:
    """The answers to a file's questions. `reported`: what a bare variant means where no sweep is named."""
    found, study = [], read_study(file)
    for place, endpoint in enumerate(study.endpoints):
        where = f"{file}: endpoints[{place}]"
        found.append(_estimated(endpoint, _loaded(endpoint, file, reported, where, read), where))
    without = (study.questions or len(found)) - len(found)
    adjusted = holm([*(change.p_value for _, _, _, change in found), *[1.0] * without])[: len(found)]
    return [
        Answer(endpoint, what, score, seeds, change, p)
        for endpoint, (what, score, seeds, change), p in zip(study.endpoints, found, adjusted, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that no more than one study in twenty finds anything where there is nothing."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def p_text(p: float) -> str:
    """0.012; "< 0.001" below that."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def cells_of(folder: Path, sweep: str | None, name: str) -> list[Path]:
    """The finished cells of `variant` of a sweep's folder beside others, or of `sweep/variant`."""
    elsewhere, _, variant = name.rpartition("/")
    place = folder / (elsewhere or sweep or "") / "cells"
    found = [file.parent for file in sorted(place.glob(f"{variant}-seed*/cell.json"))]
    if not found:
        raise UserError(f"{place}: has no finished cell of {variant}; run the sweep, or unpack its archive there.")
    return found


def load_variants(
    folder: Path, sweep: str | None, names: Sequence[str], read: Read = read_runs
) -> tuple[Loaded, dict[str, str]]:
    """These variants' finished cells together, and what each is called there."""
    cells = {name: cells_of(folder, sweep, name) for name in names}
    loaded = load_runs([run for several in cells.values() for cell in several for run in read(cell)])
    by_cells = {frozenset(run.path for run in one.runs): one.name for one in loaded.all_variants}
    for name, several in cells.items():
        if frozenset(several) not in by_cells:
            raise UserError(f"{name}: its cells' recipes differ in more than the seed.")
    return loaded, {BASE: BASE} | {name: by_cells[frozenset(several)] for name, several in cells.items()}


def _loaded(
    endpoint: Endpoint, file: Path, reported: Loaded | None, where: str, read: Read
) -> tuple[Loaded, Mapping[str, str]]:
    names = [name for name in (endpoint.variant, endpoint.minus) if name != BASE]
    if endpoint.variant == BASE:
        raise UserError(f"{where}.variant: is empty, which is the base; name a variant (`minus` may be left out).")
    if endpoint.sweep is None and any("/" in name for name in names) and not all("/" in name for name in names):
        raise UserError(f"{where}: names no sweep for {', '.join(n for n in names if '/' not in n)}; add `sweep:`.")
    if endpoint.sweep is not None or any("/" in name for name in names):
        return load_variants(file.parent, endpoint.sweep, names, read)
    if reported is None:
        raise UserError(f"{where}: names no sweep; add `sweep:`, the name of its folder beside this file.")
    known = [variant.name for variant in reported.all_variants]
    for name in names:
        if name not in known:
            raise UserError(f"{where}: {name!r} is not a variant here; there are {', '.join(known)}.")
    return reported, {name: name for name in (BASE, *names)}


def _estimated(
    endpoint: Endpoint, source: tuple[Loaded, Mapping[str, str]], where: str
) -> tuple[str, Score, int, Clustered]:
    """What is compared in words, its score, the number of common seeds, and the difference."""
    loaded, names = source
    if endpoint.suite is not None:
        _check(endpoint.suite, loaded.suites, f"{where}.suite")
        loaded = loaded.of(endpoint.suite)
    if not loaded.evaluated:
        raise UserError(f"{where}: its runs have no evaluation with figures per image; evaluate them first.")
    scores, tags = loaded.evaluation.scores, loaded.evaluation.tag_names
    key = endpoint.score or next(iter(scores))
    _check(key, list(scores), f"{where}.score")
    views = make_views(loaded)[0]
    wanted = views[0].key if endpoint.guidance is None else endpoint.guidance
    wanted = f"{wanted:g}" if isinstance(wanted, float) else wanted
    _check(wanted, [view.key for view in views], f"{where}.guidance")
    view = next(view for view in views if view.key == wanted)
    if endpoint.tag is not None:
        _check(endpoint.tag, list(tags), f"{where}.tag")
    one, other = names[endpoint.variant], names[endpoint.minus]
    for name in (one, other):
        if name not in view.guidance:
            raise UserError(f"{where}: {name or 'the base'} has no figures on the suite {loaded.suite} in this view.")
    found = find(loaded, [view]).difference(key, view, one, other)
    if found is None:
        raise UserError(f"{where}: {endpoint.variant} and {endpoint.minus or 'the base'} have no seed in common.")
    if len(found.by_seed) < endpoint.seeds:
        raise UserError(f"{where}.seeds: wants {endpoint.seeds}; {len(found.by_seed)} are there for both.")
    at = "each at its own guidance" if view.key == OWN else f"guidance {view.key}"
    what = f"{endpoint.variant} minus {endpoint.minus or 'the base'}, {endpoint.tag or scores[key].label}, {at}"
    if loaded.evaluation.split == "validation":
        what += ", on validation prompts"
    return what, scores[key], len(found.by_seed), found.tags[endpoint.tag] if endpoint.tag else found.overall


def _check(name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        raise UserError(f"{where}: got {name!r}; there are {', '.join(known)}.")

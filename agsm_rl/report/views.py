"""At which guidance models are compared: all at one, or each at its own, if that was chosen on other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agsm_rl.report.eval_file import EvalFile, Marks
from agsm_rl.report.load import Loaded, Run, Variant, difference

BASE = ""
"""The base's place among the variants, which all have names."""
OWN = "own"


@dataclass(frozen=True)
class GuidanceView:
    """A way to compare: the guidance of every variant and, under BASE, of the base."""

    key: str
    label: str
    guidance: dict[str, float]


def make_views(loaded: Loaded) -> tuple[list[GuidanceView], list[str]]:
    """The views, the one for the headline first, and what to know of them in sentences."""
    names = [BASE, *(variant.name for variant in loaded.variants)]
    views = [GuidanceView(f"{one:g}", f"guidance {one:g}", dict.fromkeys(names, one)) for one in loaded.guidances]
    with_validation = [run for run in loaded.runs if run.validation is not None]
    if not with_validation:
        several = len(loaded.guidances) > 1
        return views, [
            "No guidance is called the best: none was chosen on other prompts than these."
        ] if several else []
    if len(with_validation) < len(loaded.runs):
        missing = ", ".join(run.name for run in loaded.runs if run.validation is None)
        return views, [
            "No guidance was chosen on validation prompts, because not every run has an eval-validation.json "
            f"({missing})."
        ]
    if unlike := _unlike_validations(loaded.runs):
        return views, [f"No guidance was chosen on validation prompts, because the runs' own were not alike: {unlike}."]
    own, note = _own(loaded)
    return ([own, *views], [note]) if own else (views, [note])


def _unlike_validations(runs: Sequence[Run]) -> str:
    """In what the runs' validations are unlike, or not on validation prompts; empty where all is well."""
    found = [(run, run.validation) for run in runs if run.validation is not None]
    for run, validation in found:
        if validation.split != "validation":
            return f"{run.name}'s are of the split {validation.split}"
        unlike = difference(found[0][1], validation)
        if unlike is not None:
            return f"{found[0][0].name} and {run.name} have different {unlike}"
    return ""


def _own(loaded: Loaded) -> tuple[GuidanceView | None, str]:
    """Each model at the guidance at which its validation score is the highest."""
    chosen = {BASE: choose(scores_on_validation(loaded.runs, base=True), measured_of_base(loaded))}
    for variant in loaded.variants:
        chosen[variant.name] = choose(scores_on_validation(variant.runs), measured_of(variant))
    found = {name: value for name, value in chosen.items() if value is not None}
    if len(found) < len(chosen):
        return None, "No guidance was chosen on validation prompts: those were drawn at other guidances than these."
    size = len(loaded.runs[0].validation.prompts) if loaded.runs[0].validation else 0
    note = f"Each model's own guidance is the one at which it scores highest on {size} images of validation prompts."
    return GuidanceView(OWN, "each model at its own guidance", found), note


def scores_on_validation(runs: Sequence[Run], *, base: bool = False) -> dict[float, float]:
    """The mean over runs of the validation score by guidance, where every run has it (of the base: where any has)."""
    found: dict[float, list[float]] = {}
    for run in runs:
        assert run.validation is not None
        judged = run.validation.base if base else run.validation.trained
        for guidance, one in judged.items():
            found.setdefault(guidance, []).append(run.validation.score(one, run.validation.verdicts[0]))
    return {one: float(np.mean(values)) for one, values in found.items() if base or len(values) == len(runs)}


def choose(validation: Mapping[float, float], measured: Sequence[float]) -> float | None:
    """The best guidance on validation among those measured; the lowest of equals, which costs least to sample."""
    both = [one for one in sorted(measured) if one in validation]
    return max(both, key=lambda one: validation[one]) if both else None


def measured_of(variant: Variant) -> list[float]:
    """Guidances at which all of a variant's runs were evaluated."""
    first = variant.runs[0].evaluation.guidances
    return [one for one in first if all(one in run.evaluation.trained for run in variant.runs)]


def measured_of_base(loaded: Loaded) -> list[float]:
    """Guidances at which the base was drawn for any run."""
    return list(dict.fromkeys(one for run in loaded.runs for one in run.evaluation.guidances))


def base_marks(loaded: Loaded, run: Run, guidance: float, verdict: str) -> Marks:
    """The base's marks as the run's own evaluation has them, or else the first run's that drew it at that guidance."""
    holders = [run.evaluation, *(other.evaluation for other in loaded.runs)]
    holder: EvalFile = next(one for one in holders if guidance in one.base)
    return holder.base[guidance].marks[verdict]

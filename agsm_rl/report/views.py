"""The guidance at which models are compared: the same for all, or each model's own, if chosen on other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agsm_rl.report.eval_file import NOT_RECORDED, EvalFile
from agsm_rl.report.eval_rows import Values
from agsm_rl.report.load import Loaded, Variant, difference
from agsm_rl.report.runs import Run

BASE = ""
"""The base's key among the variants, which all have names."""
OWN = "own"


@dataclass(frozen=True)
class GuidanceView:
    """A way to compare: the guidance of every variant and, under BASE, of the base, if there is one."""

    key: str
    label: str
    guidance: dict[str, float]


def make_views(loaded: Loaded) -> tuple[list[GuidanceView], list[str]]:
    """The views, the headline's first, and sentences to show with them."""
    names = [*([BASE] if loaded.has_base else []), *(variant.name for variant in loaded.variants)]
    views = [
        GuidanceView(f"{guidance:g}", _label(guidance), dict.fromkeys(names, guidance)) for guidance in loaded.guidances
    ]
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


def _label(guidance: float) -> str:
    return "the guidance that they were drawn with" if guidance == NOT_RECORDED else f"guidance {guidance:g}"


def _unlike_validations(runs: Sequence[Run]) -> str:
    """How the runs' validations differ, or which is not on validation prompts; empty if they can be used."""
    validated = [(run, run.validation) for run in runs if run.validation is not None]
    for run, validation in validated:
        if validation.split != "validation":
            return f"{run.name}'s are of the split {validation.split}"
        unlike = difference(validated[0][1], validation)
        if unlike is None and run.evaluation.score_names[0] not in validation.scores:
            return f"{run.name}'s are not judged by the same score"
        if unlike is None and run.evaluation.base and not validation.base:
            return f"{run.name}'s do not measure the base"
        if unlike is not None:
            return f"{validated[0][0].name} and {run.name} have different {unlike}"
    return ""


def _own(loaded: Loaded) -> tuple[GuidanceView | None, str]:
    """Each model at the guidance with its highest validation score."""
    chosen = {}
    if loaded.has_base:
        chosen[BASE] = choose(scores_on_validation(loaded.runs, base=True), measured_of_base(loaded))
    for variant in loaded.variants:
        chosen[variant.name] = choose(scores_on_validation(variant.runs), measured_of(variant))
    guidance = {name: value for name, value in chosen.items() if value is not None}
    if len(guidance) < len(chosen):
        return None, "No guidance was chosen on validation prompts: those were drawn at other guidances than these."
    size = len(loaded.runs[0].validation.prompts) if loaded.runs[0].validation else 0
    note = f"Each model's own guidance is the one at which it scores highest on {size} images of validation prompts."
    return GuidanceView(OWN, "each model at its own guidance", guidance), note


def scores_on_validation(runs: Sequence[Run], *, base: bool = False) -> dict[float, float]:
    """The mean over runs of the validation score by guidance, if every run has it (for the base: if any run has)."""
    scores: dict[float, list[float]] = {}
    for run in runs:
        assert run.validation is not None
        judged = run.validation.base if base else run.validation.trained
        for guidance, result in judged.items():
            value = run.validation.score(result, run.evaluation.score_names[0])
            scores.setdefault(guidance, []).append(value)
    return {guidance: float(np.mean(values)) for guidance, values in scores.items() if base or len(values) == len(runs)}


def choose(validation: Mapping[float, float], measured: Sequence[float]) -> float | None:
    """The best guidance on validation among those measured; ties go to the lowest, which costs least to sample."""
    both = [guidance for guidance in sorted(measured) if guidance in validation]
    return max(both, key=lambda guidance: validation[guidance]) if both else None


def measured_of(variant: Variant) -> list[float]:
    """Guidances at which all of a variant's runs were evaluated."""
    first = variant.runs[0].evaluation.guidances
    return [guidance for guidance in first if all(guidance in run.evaluation.trained for run in variant.runs)]


def measured_of_base(loaded: Loaded) -> list[float]:
    """Guidances at which the base was drawn for any run."""
    return list(dict.fromkeys(guidance for run in loaded.runs for guidance in run.evaluation.base))


def base_values(loaded: Loaded, run: Run, guidance: float, score: str) -> Values:
    """The base's figures from the run's own evaluation, else from the first run that drew it at that guidance."""
    holders = [run.evaluation, *(sibling.evaluation for sibling in loaded.runs)]
    holder: EvalFile = next(evaluation for evaluation in holders if guidance in evaluation.base)
    return holder.base[guidance].values[score]

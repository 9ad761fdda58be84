"""The result of a comparison in one sentence with its intervals, and what it is based on."""

from __future__ import annotations

from agsm_rl.evaluate.intervals import Interval
from agsm_rl.report.compare import Estimate
from agsm_rl.report.findings import Findings
from agsm_rl.report.load import Loaded
from agsm_rl.report.views import BASE, OWN, GuidanceView, scores_on_validation

MAX_LISTED = 4
"""Up to this many figures are listed in the sentence; more are summarised."""
ENOUGH_SEEDS = 5
"""With fewer seeds, the interval itself is rough."""


def headline(loaded: Loaded, views: list[GuidanceView], findings: Findings) -> str:
    """The sentence, about the first verdict."""
    if not loaded.evaluated:
        subject = loaded.variants[0].name if len(loaded.variants) == 1 else f"{len(loaded.variants)} variants"
        return f"How {subject} learned. Nothing was evaluated, so there are only curves."
    verdict = loaded.evaluation.verdicts[0]
    what = f"images that are {loaded.evaluation.labels[verdict].partition(' (')[0]}"
    names = [variant.name for variant in loaded.variants]
    if views[0].key == OWN:
        return _with_own_guidance(loaded, views[0], findings, verdict, what)
    if len(names) == 1:
        parts = []
        for place, view in enumerate(views):
            start = f"{names[0]} {{verb}} the share of {what}" if place == 0 else "it {verb} it"
            parts.append(f"at {view.label} {_sentence(start, findings, view, names[0], verdict)}")
        return f"{_on(loaded)} {'; '.join(parts)}."
    if len(names) * len(views) <= MAX_LISTED:
        parts = []
        for view in views:
            changes = [f"{name} {_points(_against_base(findings, verdict, view, name).overall)}" for name in names]
            parts.append(f"at {view.label} {_listed(changes)}")
        return f"Against the base, in points of the share of {what}: {'; '.join(parts)}."
    parts = [f"at {view.label}: {_counted(findings, view, names, verdict)}" for view in views]
    return f"Of {len(names)} variants trained to raise the share of {what}, {'; '.join(parts)}."


def reach(loaded: Loaded) -> str:
    """The number of images and seeds behind the result, and what the intervals cover."""
    if not loaded.evaluated:
        return (
            "To compare with the base, run: agsm-rl eval RUN --suite geneval --compare --images RUN/geneval --json "
            "RUN/eval.json, then make the report again."
        )
    evaluation = loaded.evaluation
    counts = [len(variant.runs) for variant in loaded.variants]
    seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    plural = "" if max(counts) == 1 else "s"
    each = " per variant" if len(counts) > 1 else ""
    suffix = f" with “{evaluation.prompt_suffix}” appended" if evaluation.prompt_suffix else ""
    drawn = (
        f"{len(evaluation.prompts)} images of {len(set(evaluation.prompts))} {evaluation.split.replace('_', '-')} "
        f"prompts{suffix}, the same noise for all models; {seeds} training seed{plural}{each}."
    )
    if max(counts) == 1:
        return f"{drawn} The 95 % intervals are over images only: another training seed may differ by more."
    over = "The 95 % intervals are over training seeds and prompts (bootstrap)"
    if min(counts) == 1:
        over += "; for variants with one seed they are over images only"
    rough = f"; with fewer than {ENOUGH_SEEDS} seeds they are rough" if min(counts) < ENOUGH_SEEDS else ""
    return f"{drawn} {over}{rough}."


def _with_own_guidance(loaded: Loaded, view: GuidanceView, findings: Findings, verdict: str, what: str) -> str:
    """The sentence about the best variant on the validation prompts; its figure here is therefore not a lucky pick."""
    on_validation = {
        variant.name: scores_on_validation(variant.runs)[view.guidance[variant.name]] for variant in loaded.variants
    }
    first, *others = sorted(on_validation, key=lambda name: -on_validation[name])
    at = f"(at guidance {view.guidance[first]:g}, the base at {view.guidance[BASE]:g})"
    sentence = _sentence(f"{first} {at} {{verb}} the share of {what}", findings, view, first, verdict)
    if not others:
        return f"{_on(loaded)} {sentence}."
    change = findings.difference(verdict, view, first, others[0])
    rest = f"; minus {others[0]}, next best on validation prompts: {_points(change.overall)} points" if change else ""
    return f"{_on(loaded)} {sentence}{rest}."


def _on(loaded: Loaded) -> str:
    """The start of a sentence, so that it does not start with the name of a variant, which may be in lower case."""
    return f"On {loaded.evaluation.split.replace('_', '-')} prompts,"


def _sentence(start: str, findings: Findings, view: GuidanceView, name: str, verdict: str) -> str:
    before, after = findings.score(verdict, view, BASE).overall.value, findings.score(verdict, view, name).overall.value
    change = _against_base(findings, verdict, view, name).overall
    verb = "does not clearly change" if not change.excludes_zero else "raises" if change.value > 0 else "lowers"
    return f"{start.format(verb=verb)} from {100 * before:.1f} to {100 * after:.1f} %, {_points(change)} points"


def _counted(findings: Findings, view: GuidanceView, names: list[str], verdict: str) -> str:
    changes = {name: _against_base(findings, verdict, view, name).overall for name in names}
    up = [change for change in changes.values() if change.low > 0]
    down = [change for change in changes.values() if change.high < 0]
    top = max(changes, key=lambda name: changes[name].value)
    text = f"{len(up) or 'none'} clearly {'does' if len(up) == 1 else 'do'}"
    text += f", {len(down)} lower{'s' if len(down) == 1 else ''} it" if down else ""
    return f"{text} (the highest is {top}'s {_points(changes[top])} points)"


def _against_base(findings: Findings, verdict: str, view: GuidanceView, name: str) -> Estimate:
    change = findings.difference(verdict, view, name)
    assert change is not None
    return change


def _points(part: Interval) -> str:
    return f"{signed(part.value)} [{signed(part.low)}, {signed(part.high)}]"


def signed(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    rounded = round(100 * value, 1) + 0.0  # avoid −0.0
    return f"{rounded:+.1f}".replace("-", "−")


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"

"""The result of a comparison in one sentence with its intervals, and what it is based on."""

from __future__ import annotations

from collections.abc import Sequence

from agsm_rl.report.compare import Estimate
from agsm_rl.report.endpoints import Answer
from agsm_rl.report.eval_file import EvalFile
from agsm_rl.report.eval_rows import Score
from agsm_rl.report.findings import Findings
from agsm_rl.report.load import Loaded
from agsm_rl.report.texts import change_text, decimals_of, number, value_text
from agsm_rl.report.views import BASE, OWN, GuidanceView, scores_on_validation

MAX_LISTED = 4
"""Up to this many figures are listed in the sentence; more are summarised."""


def headline(loaded: Loaded, views: list[GuidanceView], findings: Findings) -> str:
    """The sentence, about the first score of the first suite."""
    if not loaded.evaluated:
        subject = loaded.variants[0].name if len(loaded.variants) == 1 else f"{len(loaded.variants)} variants"
        if loaded.figures:
            return f"What was measured of {subject}. No image has a figure of its own, so nothing can be paired."
        return f"How {subject} learned. Nothing was evaluated, so there are only curves."
    name, score = next(iter(loaded.evaluation.scores.items()))
    what = f"the share of images that are {score.label.partition(' (')[0]}" if score.share else f"mean {score.label}"
    if not all(variant.has_base for variant in loaded.variants):
        return _without_base(loaded, views[0], findings, name, what)
    names = [variant.name for variant in loaded.variants]
    if views[0].key == OWN:
        return _with_own_guidance(loaded, views[0], findings, name, what)
    if len(names) == 1:
        parts = []
        for place, view in enumerate(views):
            start = f"{names[0]} {{verb}} {what}" if place == 0 else "it {verb} it"
            parts.append(f"at {view.label} {_sentence(start, findings, view, names[0], name, score)}")
        return f"{_on(loaded)} {'; '.join(parts)}."
    if len(names) * len(views) <= MAX_LISTED:
        parts = []
        for view in views:
            changes = [f"{one} {change_text(score, _against_base(findings, name, view, one).overall)}" for one in names]
            parts.append(f"at {view.label} {_listed(changes)}")
        unit = "in points of" if score.share else "change of"
        return f"Against the base, {unit} {what}: {'; '.join(parts)}."
    parts = [f"at {view.label}: {_counted(findings, view, names, name, score)}" for view in views]
    return f"Of {len(names)} variants trained to raise {what}, {'; '.join(parts)}."


def answered_headline(answers: Sequence[Answer]) -> str:
    """The sentence where primary endpoints were named: only these are findings."""
    told = [answer for answer in answers if answer.told_apart]
    start = f"Of {len(answers)} question{'s' if len(answers) > 1 else ''} that were named, "
    if not told:
        return f"{start}none is answered: no two models are told apart after Holm's correction."
    listed = "; ".join(
        f"{answer.endpoint.question.rstrip('?')}: {answer.verdict}, {answer.figures[0]}" for answer in told
    )
    return (
        f"{start}{len(told)} tell{'s' if len(told) == 1 else ''} two models apart after Holm's correction ({listed})."
    )


def reach(loaded: Loaded) -> str:
    """The number of images and seeds behind the result, and what the intervals cover."""
    if not loaded.evaluated:
        if loaded.figures:
            return "The figures are those that the evaluations hold."
        return (
            "To compare with the base, run: agsm-rl eval RUN --suite rewards --reward NAME --prompts FILE --compare "
            "--images RUN/images --json RUN/eval.json, then make the report again."
        )
    evaluation = loaded.evaluation
    counts = [len(variant.runs) for variant in loaded.variants]
    seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    plural = "" if max(counts) == 1 else "s"
    each = " per variant" if len(counts) > 1 else ""
    suffix = f" with “{evaluation.prompt_suffix}” appended" if evaluation.prompt_suffix else ""
    on = f"{_prompts(evaluation)} prompts" if _prompts(evaluation) else "prompts"
    kinds = evaluation.requirements
    units = f" ({len(set(kinds))} requirements)" if kinds else ""
    drawn = (
        f"{len(evaluation.prompts)} images of {len(set(evaluation.prompts))} {on}{units}{suffix}, the same noise for "
        f"all models; {seeds} training seed{plural}{each}."
    )
    over_what = "requirements" if kinds else "prompts"
    if max(counts) == 1:
        return f"{drawn} The 95 % intervals are over {over_what} only: another training seed may differ by more."
    over = f"The 95 % intervals are over {over_what} and training seeds"
    if min(counts) == 1:
        over += f"; for variants with one seed they are over {over_what} only"
    return f"{drawn} {over}."


def _without_base(loaded: Loaded, view: GuidanceView, findings: Findings, name: str, what: str) -> str:
    """The sentence where the base was not measured beside every variant: what each reaches."""
    score = loaded.evaluation.scores[name]
    reached = {one.name: findings.score(name, view, one.name).overall for one in loaded.variants}
    start = f"{_on(loaded)} at {view.label}, {what}"
    if len(reached) > MAX_LISTED:
        top = max(reached, key=lambda one: reached[one].value)
        return f"{start}: {top} is the highest of {len(reached)}, {value_text(score, reached[top])}."
    listed = [f"{one} {value_text(score, part)}" for one, part in reached.items()]
    beside = "it" if len(listed) == 1 else "all of them"
    return f"{start}: {_listed(listed)}. The base was not measured beside {beside}."


def _with_own_guidance(loaded: Loaded, view: GuidanceView, findings: Findings, name: str, what: str) -> str:
    """The sentence about the best variant on the validation prompts; its figure here is therefore not a lucky pick."""
    score = loaded.evaluation.scores[name]
    on_validation = {
        variant.name: scores_on_validation(variant.runs)[view.guidance[variant.name]] for variant in loaded.variants
    }
    first, *others = sorted(on_validation, key=lambda one: -on_validation[one])
    at = f"(at guidance {view.guidance[first]:g}, the base at {view.guidance[BASE]:g})"
    sentence = _sentence(f"{first} {at} {{verb}} {what}", findings, view, first, name, score)
    if not others:
        return f"{_on(loaded)} {sentence}."
    change = findings.difference(name, view, first, others[0])
    unit = " points" if score.share else ""
    rest = (
        f"; minus {others[0]}, next best on validation prompts: {change_text(score, change.overall)}{unit}"
        if change
        else ""
    )
    return f"{_on(loaded)} {sentence}{rest}."


def _on(loaded: Loaded) -> str:
    """The start of a sentence, so that it does not start with the name of a variant, which may be in lower case."""
    named = _prompts(loaded.evaluation)
    return f"On {named} prompts," if named else f"On {len(set(loaded.evaluation.prompts))} prompts,"


def _prompts(evaluation: EvalFile) -> str:
    return evaluation.split.replace("_", "-")


def _sentence(start: str, findings: Findings, view: GuidanceView, model: str, name: str, score: Score) -> str:
    before, after = findings.score(name, view, BASE).overall.value, findings.score(name, view, model).overall.value
    change = _against_base(findings, name, view, model).overall
    verb = "does not clearly change" if not change.excludes_zero else "raises" if change.value > 0 else "lowers"
    if score.share:
        reached = f"from {100 * before:.1f} to {100 * after:.1f} %, {change_text(score, change)} points"
    else:
        decimals = decimals_of(change)
        reached = f"from {number(before, decimals)} to {number(after, decimals)}, {change_text(score, change)}"
    return f"{start.format(verb=verb)} {reached}"


def _counted(findings: Findings, view: GuidanceView, models: list[str], name: str, score: Score) -> str:
    changes = {model: _against_base(findings, name, view, model).overall for model in models}
    up = [change for change in changes.values() if change.low > 0]
    down = [change for change in changes.values() if change.high < 0]
    top = max(changes, key=lambda model: changes[model].value)
    text = f"{len(up) or 'none'} clearly {'does' if len(up) == 1 else 'do'}"
    text += f", {len(down)} lower{'s' if len(down) == 1 else ''} it" if down else ""
    unit = " points" if score.share else ""
    return f"{text} (the highest is {top}'s {change_text(score, changes[top])}{unit})"


def _against_base(findings: Findings, name: str, view: GuidanceView, model: str) -> Estimate:
    change = findings.difference(name, view, model)
    assert change is not None
    return change


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]

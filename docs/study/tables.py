"""The figures of the study's pages, by the report's own estimates: `python docs/study/tables.py [SWEEP ...]`.

It reads the cells as the archives unpack them: `for one in docs/study/*.tar.xz; do tar xf $one -C docs/study; done`.
What stands between these comments is written anew, in README.md beside this and in the pages that quote it:

    <!-- table ... -->      up to <!-- end -->: a table; the comment says in YAML what is in it
    <!-- endpoints FILE --> up to <!-- end -->: the answers to a file of primary endpoints (agsm_rl/report/endpoints.py)
    <!-- figure NAME -->    up to <!-- / -->: one figure in a sentence; figures.yaml says which

A table:

    sweep: whose cells a bare name means; another's are written `sweep/variant`
    rows:  label by variant, what is in brackets at its end only here; each variant's scores, and what they are above
           the base's; under "" what the base is called, if it is another
    minus: pairs of variants, whose differences are shown below
    tags:  variants whose scores are shown tag by tag
    curves: in place of the scores, some at every guidance: each with the tag that it is taken of, or "" for the mean
    gains: rewards or scores; for each, what every variant's seeds gained over the base on these very images, with an
           interval over seeds alone
    learned: in place of the scores, by reward: arms, each with what it began from ("" for the base). How much larger
           the mean reward of the validation prompts' images is at guidance 1, with an interval over seeds alone
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from statsmodels.stats.weightstats import DescrStatsW

from agsm_rl.errors import UserError
from agsm_rl.evaluate.intervals import Interval
from agsm_rl.report.compare import Estimate, Quantity, estimate
from agsm_rl.report.endpoints import answers, load_variants
from agsm_rl.report.findings import find
from agsm_rl.report.load import Loaded
from agsm_rl.report.runs import Run, read_runs
from agsm_rl.report.texts import signed
from agsm_rl.report.views import BASE, OWN, GuidanceView, base_values, make_views
from agsm_rl.run.phases import phases

HERE = Path(__file__).parent
PAGES = (
    "docs/study/README.md",
    "docs/study/scenes.md",
    "README.md",
    "docs/results.md",
    "docs/limits.md",
    "docs/objectives/agsm.md",
)
"""Where the figures are quoted, from the project's folder."""
BLOCK = re.compile(r"(<!-- (table|endpoints)\s(.*?)-->\n).*?(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure (\S+) -->).*?(<!-- / -->)", re.DOTALL)
BRACKETS = re.compile(r" \([^)]*\)$")
"""What a label says beside the name."""
VERDICT, TAG = "strict", "counting"

read_cell = cache(read_runs)
load_cells = partial(load_variants, HERE, read=read_cell)


class Table:
    """The variants of one table and their estimates, by the page's names."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.labels: dict[str, str] = {BASE: "base"} | asked["rows"]
        loaded, self.names = load_cells(asked["sweep"], [name for name in asked["rows"] if name != BASE])
        self.tag_names = loaded.evaluation.tag_names
        self.views = make_views(loaded)[0]
        self.found = find(loaded, self.views)
        by_name = {variant.name: variant for variant in loaded.variants}
        self.variants = {name: by_name[called] for name, called in self.names.items() if name != BASE}

    def lines(self, asked: Mapping[str, Any]) -> list[str]:
        """All that is asked for, as Markdown."""
        if "learned" in asked:
            parts = [self.learned(asked["learned"])]
        else:
            parts = [self.curves(asked["curves"]) if "curves" in asked else self.scores()]
        if "tags" in asked:
            parts.append(self.by_tag([BASE, *asked["tags"]]))
        if "gains" in asked:
            parts.append(self.gains(asked["gains"]))
        if "minus" in asked:
            parts.append(self.differences(asked["minus"]))
        return [line for part in parts for line in ["", *part]] + [""]

    def scores(self) -> list[str]:
        """A row a variant: its score and what it is above the base; at the other guidances the score alone."""
        shown, others = self._shown()
        first = next(iter(self.variants.values())).runs[0].evaluation
        rewards = list(first.trained[first.guidances[0]].rewards)
        head = ["", "seeds"]
        for view in shown:
            own = ["own guidance"] if view.key == OWN else []
            head += [*own, f"{_at(view)}, %", "minus the base", TAG]
        rows = []
        for name, label in self.labels.items():
            row = [label, str(len(self.variants[name].runs)) if name else ""]
            for view in shown:
                score = self.found.score(VERDICT, view, self.names[name]).overall
                row += [f"{view.guidance[self.names[name]]:g}"] if view.key == OWN else []
                row.append(_share(score))
                row += _points(self._minus(view, name)) if name else ["", ""]
            row += [_percent(self.found.score(VERDICT, view, self.names[name]).overall.value) for view in others]
            row += [self._reward(name, first.guidances[0], one) for one in rewards]
            rows.append(row)
        return _markdown(
            [*head, *(_at(view) for view in others), *(f"{one} at {first.guidances[0]:g}" for one in rewards)], rows
        )

    def curves(self, asked: Mapping[str, str]) -> list[str]:
        """A row a variant and a column a guidance, the scores asked for in each."""
        views = [view for view in self.views if view.key != OWN]
        rows = []
        for name, label in self.labels.items():
            row = [label, str(len(self.variants[name].runs)) if name else ""]
            for view in views:
                found = {score: self.found.score(score, view, self.names[name]) for score in asked}
                parts = [found[score].tags[tag] if tag else found[score].overall for score, tag in asked.items()]
                row.append(" / ".join(_percent(part.value) for part in parts))
            rows.append(row)
        return _markdown(["", "seeds", *(_at(view) for view in views)], rows)

    def by_tag(self, names: Sequence[str]) -> list[str]:
        """Each variant's score in each tag, in the first view."""
        rows = []
        for name in names:
            tags = self.found.score(VERDICT, self.views[0], self.names[name]).tags
            rows.append([self.labels[name], *(_percent(tags[tag].value, 0) for tag in self.tag_names)])
        return _markdown([f"{_at(self.views[0])}, %", *self.tag_names], rows)

    def differences(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """A row a pair, over the seeds that both have."""
        shown, _ = self._shown()
        head = ["", "seeds", *(title for view in shown for title in (_at(view), TAG))]
        rows = []
        for one, other in pairs:
            seeds = set(self.variants[one].seeds) & set(self.variants[other].seeds)
            row = [" minus ".join(BRACKETS.sub("", self.labels[name]) for name in (one, other)), str(len(seeds))]
            rows.append([*row, *(part for view in shown for part in _points(self._minus(view, one, other)))])
        return _markdown(head, rows)

    def gains(self, rewards: Sequence[str]) -> list[str]:
        """A row a variant: the mean gain of each reward over the base at the first guidance, and its seeds' gains."""
        head = ["", "seeds", *(part for reward in rewards for part in (f"{reward} minus the base's", "seed by seed"))]
        rows = []
        for name in [name for name in self.labels if name]:
            row = [self.labels[name], str(len(self.variants[name].runs))]
            for reward in rewards:
                found = [_gain(run.evaluation, reward) for run in self.variants[name].runs]
                row.append(_with_bounds(found))
                row.append(", ".join(_signed(one) for one in found))
            rows.append(row)
        return _markdown(head, rows)

    def learned(self, rewards: Mapping[str, Mapping[str, str]]) -> list[str]:
        """A row an arm: how much it raised its own reward above what it began from, and whether clear of zero."""
        head = ["", "began from", "its reward", "seeds", "mean gain", "seed by seed", "learned"]
        rows = []
        for reward, began_from in rewards.items():
            for name, first in began_from.items():
                before = {run.seed: _mean_reward(run, reward) for run in self.variants[first].runs} if first else {}
                changes = [
                    _mean_reward(run, reward) - (before[run.seed] if first else _mean_reward(run, reward, base=True))
                    for run in self.variants[name].runs
                ]
                learned = "yes" if DescrStatsW(changes).tconfint_mean()[0] > 0 else "no"
                row = [self.labels[name], self.labels[first], reward, str(len(changes)), _with_bounds(changes)]
                rows.append([*row, ", ".join(_signed(one) for one in changes), learned])
        return _markdown(head, rows)

    def _shown(self) -> tuple[list[GuidanceView], list[GuidanceView]]:
        """The views that are shown with intervals, and the rest: beside an own guidance only the first has them."""
        if self.views[0].key != OWN:
            return self.views, []
        return self.views[:2], self.views[2:]

    def _minus(self, view: GuidanceView, name: str, other: str = BASE) -> Estimate:
        found = self.found.difference(VERDICT, view, self.names[name], self.names[other])
        assert found is not None, f"{name} and {other} have no seed in common"
        return found

    def _reward(self, name: str, guidance: float, reward: str) -> str:
        means = []
        for run in self.variants[name or next(iter(self.variants))].runs:
            judged = (run.evaluation.trained if name else run.evaluation.base)[guidance]
            is_score = reward in run.evaluation.scores
            means.append(run.evaluation.score(judged, reward) if is_score else judged.rewards[reward])
        return f"{np.mean(means):.4f}"


def figure(asked: Mapping[str, Any]) -> str:
    """One figure in points with its interval, or a score in percent.

    `variant` and `minus` (the base, if not given) of `sweep`, at `guidance`, in a `tag`, if given; `score: true` is
    what the variant reaches, or with `base: true` the base beside it. `gain: REWARD` is the difference of its means,
    over seeds. `bases: [one, other]` is the base beside one variant minus that beside another. `own_draws: true` is
    the reward that the variant drew in the last third of its draws minus the first, over seeds. `metric: NAME` is a
    metric of the variant's typical step; with `over: VARIANT`, divided by that other's.
    """
    if "bases" in asked:
        return _points_of(bases_differ(asked["bases"], asked["sweep"], str(asked["guidance"])))
    names = [asked[key] for key in ("variant", "minus", "over") if asked.get(key, BASE) != BASE]
    loaded, called = load_cells(asked["sweep"], names)
    if asked.get("own_draws"):
        return drawn_later(loaded, called[asked["variant"]])
    if "gain" in asked:
        return gained_more(loaded, [called[name] for name in names], asked["gain"])
    if "metric" in asked:
        wanted = [asked[key] for key in ("variant", "over") if key in asked]
        return typical_step(loaded, [called[name] for name in wanted], asked["metric"])
    view = _view(loaded, str(asked["guidance"]))
    found, one = find(loaded, [view]), called[BASE if asked.get("base") else asked["variant"]]
    if asked.get("score"):
        return _percent(found.score(VERDICT, view, one).overall.value)
    change = found.difference(VERDICT, view, one, called[asked.get("minus", BASE)])
    assert change is not None, f"{names}: no seed in common"
    return _points_of(change.tags[asked["tag"]] if "tag" in asked else change.overall)


def gained_more(loaded: Loaded, names: Sequence[str], reward: str) -> str:
    """What one variant's seeds gained of a reward above what another's did, seed by seed, with Student's interval."""
    by_seed = {one.name: {run.seed: _gain(run.evaluation, reward) for run in one.runs} for one in loaded.variants}
    one, other = (by_seed[name] for name in names)
    changes = [one[seed] - other[seed] for seed in one if seed in other]
    return _with_bounds(changes)


def drawn_later(loaded: Loaded, variant: str) -> str:
    """The mean reward of a variant's last third of draws minus its first, with Student's interval over seeds."""
    changes = []
    for run in next(one for one in loaded.variants if one.name == variant).runs:
        (draws,) = [draws for phase in phases(_steps(run)) for draws in phase.draws]
        first, last = draws.thirds
        changes.append(float(np.mean(last) - np.mean(first)))
    return _with_bounds(changes)


def typical_step(loaded: Loaded, names: Sequence[str], metric: str) -> str:
    """A metric's median over a variant's steps, and of two variants their ratio, seed by seed; the seeds' median."""
    medians = {
        one.name: {run.seed: np.median([row[metric] for row in _steps(run)]) for run in one.runs}
        for one in loaded.variants
    }
    one, *others = (medians[name] for name in names)
    other = others[0] if others else dict.fromkeys(one, 1.0)
    return f"{np.median([one[seed] / other[seed] for seed in one if seed in other]):.2f}"


def bases_differ(variants: Sequence[str], sweep: str, guidance: str) -> Interval:
    """What the base beside one variant's runs scores above the base beside another's, on the same prompts and noise."""
    values = []
    for name in variants:
        loaded, _ = load_cells(sweep, [name])
        values.append(base_values(loaded, loaded.runs[0], float(guidance), VERDICT)[None])
    change = {0: Quantity(values[0], values[1])}
    return estimate(change, loaded.evaluation.layout)[0].overall


def endpoints(file: Path) -> list[str]:
    """A row a question."""
    rows = [
        [answer.endpoint.question, answer.what, str(answer.seeds), *answer.figures, answer.verdict]
        for answer in answers(file, read=read_cell)
    ]
    return ["", *_markdown(["question", "endpoint", "seeds", "difference", "p", "Holm", ""], rows), ""]


def _view(loaded: Loaded, guidance: str) -> GuidanceView:
    return next(view for view in make_views(loaded)[0] if view.key == guidance)


def _steps(run: Run) -> list[dict[str, Any]]:
    """The metrics of a run's training steps."""
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _gain(evaluation: Any, reward: str) -> float:
    """How much larger a run's mean reward, or score, is than the base's: same prompts and noise, first guidance."""
    trained, base = (judged[evaluation.guidances[0]] for judged in (evaluation.trained, evaluation.base))
    if reward in evaluation.scores:
        return float(evaluation.score(trained, reward) - evaluation.score(base, reward))
    return float(trained.rewards[reward] - base.rewards[reward])


def _mean_reward(run: Run, reward: str, *, base: bool = False) -> float:
    """The mean over the images of the validation prompts at guidance 1."""
    evaluation = run.validation or run.evaluation
    assert evaluation.split == "validation", f"{run.path} has no evaluation of validation prompts"
    judged = (evaluation.base if base else evaluation.trained)[1.0]
    return float(np.mean(judged.values[reward])) if reward in evaluation.scores else judged.rewards[reward]


def _with_bounds(by_seed: Sequence[float]) -> str:
    low, high = DescrStatsW(by_seed).tconfint_mean() if len(by_seed) > 1 else (np.nan, np.nan)
    return f"{_signed(float(np.mean(by_seed)))} [{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _at(view: GuidanceView) -> str:
    return "at own" if view.key == OWN else f"at {view.key}"


def _share(part: Interval) -> str:
    return f"{_percent(part.value)} [{_percent(part.low)}, {_percent(part.high)}]"


def _percent(share: float, decimals: int = 1) -> str:
    return f"{round(100 * share, 9):.{decimals}f}"  # a tie falls alike on every machine


def _points(change: Estimate) -> list[str]:
    return [_points_of(part) for part in (change.overall, change.tags[TAG])]


def _points_of(part: Interval) -> str:
    return f"{signed(part.value)} [{signed(part.low)}, {signed(part.high)}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def sweeps_of(block: re.Match[str]) -> set[str]:
    """The sweeps that a block's or a figure's cells are of; of endpoints, none are known before they are read."""
    if block.re is FIGURE:
        return {_figures()[block[2]]["sweep"]}
    return {yaml.safe_load(block[3])["sweep"]} if block[2] == "table" else set()


def _figures() -> dict[str, Any]:
    return dict(yaml.safe_load((HERE / "figures.yaml").read_text(encoding="utf-8")))


def written(block: re.Match[str]) -> str:
    """A block or a figure with its content made anew."""
    if block.re is FIGURE:
        return f"{block[1]}{figure(_figures()[block[2]])}{block[3]}"
    if block[2] == "endpoints":
        return "\n".join([block[1].rstrip(), *endpoints(HERE / block[3].strip()), block[4]])
    asked = yaml.safe_load(block[3])
    return "\n".join([block[1].rstrip(), *Table(asked).lines(asked), block[4]])


def main(only: Sequence[str]) -> None:
    """Write the figures of these sweeps, or all."""
    pages = [file for name in PAGES if (file := HERE.parents[1] / name).is_file()]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    blocks = [block for text in texts.values() for kind in (BLOCK, FIGURE) for block in kind.finditer(text)]
    sweeps = {sweep for block in blocks for sweep in sweeps_of(block)}
    if unknown := set(only) - sweeps:
        known = ", ".join(sorted(sweeps))
        raise SystemExit(f"no page has a figure of {', '.join(sorted(unknown))}; there are figures of {known}.")

    def anew(block: re.Match[str]) -> str:
        return written(block) if not only or sweeps_of(block) & set(only) else block[0]

    for page, text in texts.items():
        try:
            page.write_text(FIGURE.sub(anew, BLOCK.sub(anew, text)), encoding="utf-8")
        except UserError as mistake:
            raise SystemExit(f"{page}: {mistake}") from mistake


if __name__ == "__main__":
    main(sys.argv[1:])

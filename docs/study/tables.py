"""The tables of README.md beside this, by the report's own estimates: `python docs/study/tables.py [SWEEP ...]`.

It reads the cells as the archives unpack them: `for one in docs/study/*.tar.xz; do tar xf $one -C docs/study; done`. A
table's comment in the page, `<!-- table ... -->`, says in YAML what is in it; what follows up to `<!-- end -->` is
written anew.

    sweep: whose cells a bare name means; another's are written `sweep/variant`
    rows:  label by variant, what is in brackets at its end only here; each variant's scores, and what they are above
           the base's; under "" what the base is called, if it is another
    minus: pairs of variants, whose differences are shown below
    tags:  variants whose scores are shown tag by tag
    gains: rewards; for each, what every variant's seeds gained over the base, with an interval over seeds
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from statsmodels.stats.weightstats import DescrStatsW

from agsm_rl.evaluate.intervals import Interval
from agsm_rl.report.compare import Estimate
from agsm_rl.report.findings import find
from agsm_rl.report.load import load
from agsm_rl.report.texts import signed
from agsm_rl.report.views import BASE, OWN, GuidanceView, make_views

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- table\n(.*?)-->\n).*?(<!-- end -->)", re.DOTALL)
BRACKETS = re.compile(r" \([^)]*\)$")
"""What a label says beside the name."""
VERDICT, TAG = "strict", "counting"


def cells_of(name: str, sweep: str) -> list[Path]:
    """The finished cells of `variant`, or of `sweep/variant`."""
    elsewhere, _, variant = name.rpartition("/")
    place = HERE / (elsewhere or sweep) / "cells"
    found = [file.parent for file in sorted(place.glob(f"{variant}-seed*/cell.json"))]
    if not found:
        raise SystemExit(f"{place}: has no finished cell of {variant}; unpack {elsewhere or sweep}.tar.xz here first.")
    return found


class Table:
    """The variants of one table and their estimates, by the page's names."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.labels: dict[str, str] = {BASE: "base"} | asked["rows"]
        cells = {name: cells_of(name, asked["sweep"]) for name in asked["rows"] if name != BASE}
        loaded = load([cell for several in cells.values() for cell in several])
        self.tag_names = loaded.evaluation.tag_names
        self.views = make_views(loaded)[0]
        self.found = find(loaded, self.views)
        by_cells = {tuple(run.path for run in one.runs): one for one in loaded.variants}
        for name, several in cells.items():
            if tuple(several) not in by_cells:
                raise SystemExit(f"{name}: its cells' recipes differ in more than the seed.")
        self.variants = {name: by_cells[tuple(several)] for name, several in cells.items()}
        self.names = {BASE: BASE} | {name: variant.name for name, variant in self.variants.items()}

    def lines(self, asked: Mapping[str, Any]) -> list[str]:
        """All that is asked for, as Markdown."""
        parts = [self.scores()]
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
            row += [f"{100 * self.found.score(VERDICT, view, self.names[name]).overall.value:.1f}" for view in others]
            row += [self._reward(name, first.guidances[0], one) for one in rewards]
            rows.append(row)
        return _markdown(
            [*head, *(_at(view) for view in others), *(f"{one} at {first.guidances[0]:g}" for one in rewards)], rows
        )

    def by_tag(self, names: Sequence[str]) -> list[str]:
        """Each variant's score in each tag, in the first view."""
        rows = []
        for name in names:
            tags = self.found.score(VERDICT, self.views[0], self.names[name]).tags
            rows.append([self.labels[name], *(f"{100 * tags[tag].value:.0f}" for tag in self.tag_names)])
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
                low, high = DescrStatsW(found).tconfint_mean() if len(found) > 1 else (np.nan, np.nan)
                row.append(" ".join([_signed(np.mean(found)), f"[{_signed(low)}, {_signed(high)}]"]))
                row.append(", ".join(_signed(one) for one in found))
            rows.append(row)
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
        runs = self.variants[name or next(iter(self.variants))].runs
        judged = [run.evaluation.trained if name else run.evaluation.base for run in runs]
        return f"{np.mean([one[guidance].rewards[reward] for one in judged]):.4f}"


def _gain(evaluation: Any, reward: str) -> float:
    """How much larger a run's mean reward is than the base's, on the same prompts and noise, at the first guidance."""
    guidance = evaluation.guidances[0]
    return float(evaluation.trained[guidance].rewards[reward] - evaluation.base[guidance].rewards[reward])


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _at(view: GuidanceView) -> str:
    return "at own" if view.key == OWN else f"at {view.key}"


def _share(part: Interval) -> str:
    return f"{100 * part.value:.1f} [{100 * part.low:.1f}, {100 * part.high:.1f}]"


def _points(change: Estimate) -> list[str]:
    return [
        f"{signed(part.value)} [{signed(part.low)}, {signed(part.high)}]" for part in (change.overall, change.tags[TAG])
    ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(only: Sequence[str]) -> None:
    """Write the tables of these sweeps, or all."""
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    sweeps = {yaml.safe_load(block[2])["sweep"] for block in BLOCK.finditer(text)}
    if unknown := set(only) - sweeps:
        raise SystemExit(f"{page}: has no table of {', '.join(sorted(unknown))}; it has {', '.join(sorted(sweeps))}.")

    def written(block: re.Match[str]) -> str:
        asked = yaml.safe_load(block[2])
        if only and asked["sweep"] not in only:
            return block[0]
        return "\n".join([block[1].rstrip(), *Table(asked).lines(asked), block[3]])

    page.write_text(BLOCK.sub(written, text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

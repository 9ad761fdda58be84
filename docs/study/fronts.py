# /// script
# dependencies = ["matplotlib"]
# ///
"""Alignment against a reward, step by step and weight by weight: `python docs/study/fronts.py SWEEP OUT.png`.

SWEEP is the unpacked archive of recipes/study/scenes_matching.yaml. Left: the reward on top of the base and of three
models, a mark every few steps. Right: the reward with a guard beside it, a mark a weight. Large marks are means of
the seeds, small ones the seeds; the line is the sharpness at which the study compares.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from picture import CURVES

from agsm_rl.report.load import Loaded, load
from agsm_rl.report.runs import Run
from agsm_rl.report.views import BASE

VERDICT, REWARD, GUIDANCE = "strict", "sharpness", 1.0
STARTS = {BASE: "style", **{name: f"{name}_then_style" for name in ("agsm", "softrepa", "score_matching")}}
"""The models that the reward is learned on top of, and what the sweep calls the arms, before their steps."""
GUARDS = {"agsm": "beside_agsm", "score_matching": "beside_score_matching", "anchor": "beside_anchor"}
"""What is learned beside the reward, and what the sweep calls the arms, before their weights."""
COLORS = {"anchor": ("anchor", "#0072b2", "D")}
LONGEST = "style_48"


def place(run: Run, *, base: bool = False) -> tuple[float, float]:
    """The mean sharpness over images, and the share right in percent."""
    judged = (run.evaluation.base if base else run.evaluation.trained)[GUIDANCE]
    return float(np.mean(judged.values[REWARD])), 100 * run.evaluation.score(judged, VERDICT)


def places(loaded: Loaded) -> dict[str, np.ndarray]:
    """Each variant's seeds, [seeds, 2]; the base has one row."""
    found = {variant.name: np.array([place(run) for run in variant.runs]) for variant in loaded.variants}
    return found | {BASE: np.array([place(loaded.runs[0], base=True)])}


def matched(found: dict[str, np.ndarray]) -> float:
    """The sharpness half-way between the sharpest start and what the whole reward makes of the base (plan.md)."""
    return (max(found[start][:, 0].mean() for start in STARTS) + found[LONGEST][:, 0].mean()) / 2


def line(axes: Any, points: list[np.ndarray], curve: tuple[str, str, str]) -> None:
    """One curve through the means of these groups of seeds."""
    label, color, marker = curve
    means = np.array([group.mean(axis=0) for group in points])
    axes.plot(*means.T, color=color, marker=marker, label=label, linewidth=1.2)
    axes.scatter(*np.concatenate(points).T, s=10, color=color, marker=marker, alpha=0.35, linewidths=0)


def numbered(found: dict[str, np.ndarray], arm: str) -> list[np.ndarray]:
    """The groups of seeds of an arm's cells, by the number that their names end in."""
    numbers = {name: name.rpartition("_") for name in found}
    cells = [(float(number), name) for name, (front, _, number) in numbers.items() if front == arm]
    return [found[name] for _, name in sorted(cells)]


def main(sweep: str, out: str) -> None:
    """Write the picture."""
    found = places(load([Path(sweep)]))
    curves = CURVES | COLORS
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for start, arm in STARTS.items():
        line(left, [found[start], *numbered(found, arm)], curves[start])
    for guard, arm in GUARDS.items():
        first = [found[LONGEST]] if guard == "anchor" else []  # the reward as on the left: beside an anchor of 0.1
        line(right, [*first, *numbered(found, arm)], curves[guard])
    right.scatter(*found["unguarded"].mean(axis=0), color="black", marker="*", s=70, label="no guard")
    right.scatter(*found[BASE][0], color=curves[BASE][1], marker=curves[BASE][2], label=curves[BASE][0])
    left.set_ylabel("exactly what was asked (validation), %")
    for axes, title in ((left, "the reward after …, step by step"), (right, "the reward beside …, weight by weight")):
        axes.axvline(matched(found), color="#9ca3af", linewidth=0.8, linestyle=":")
        axes.set_xlabel("sharpness: the reward")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])

# /// script
# dependencies = ["matplotlib", "numpy"]
# ///
"""Plot the mean reward of rollouts over images sampled: `python benchmarks/reward_curves.py OUT.png RUN...`.

A run is a folder with `metrics.jsonl`; runs whose names differ only in `-seedN` share a line. A line is the mean over a
window of draws and over seeds, with a 95 % interval from the spread between draws. With more than four lines, each has
a panel of its own, with the others in grey.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WINDOW = 16
"""Draws averaged in each point of the line."""
IMAGES_PER_DRAW, UPDATES = 64, 2
"""As in the embedded recipes: `num_prompts` x `images_per_prompt`, and the steps that learn from each draw."""
COLOURS, GREY, COLUMNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), "#d1d5db", 3
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


def rewards_of(run: Path) -> np.ndarray:
    """The mean reward of each draw."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    name = next(key for key in rows[0] if key.endswith("/reward"))
    return np.array([row[name] for row in rows if name in row])[::UPDATES]


def curve_of(runs: Sequence[Path]) -> Curve:
    """Images drawn, mean reward and the half width of its interval, a number for each place of the window."""
    rewards = [rewards_of(run) for run in runs]
    by_seed = np.array([of_run[: min(map(len, rewards))] for of_run in rewards])  # seeds x draws
    windows = np.lib.stride_tricks.sliding_window_view(by_seed, WINDOW, axis=1)  # seeds x places x WINDOW
    spread = np.sqrt(windows.var(axis=2, ddof=1).mean(axis=0) / (WINDOW * len(runs)))
    return IMAGES_PER_DRAW * (np.arange(windows.shape[1]) + WINDOW), windows.mean(axis=(0, 2)), 1.96 * spread


def plot(axes: Axes, curve: Curve, colour: str, label: str = "") -> None:
    """A line with its interval."""
    images, means, spread = curve
    axes.plot(images, means, color=colour, label=label)
    axes.fill_between(images, means - spread, means + spread, color=colour, alpha=0.15)


def plot_together(curves: Mapping[str, Curve]) -> Figure:
    """All lines in one panel, with a legend."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        plot(axes, curve, colour, name)
    axes.legend(frameon=False)
    return figure


def plot_apart(curves: Mapping[str, Curve]) -> Figure:
    """A panel for each line, with the others in grey."""
    rows = math.ceil(len(curves) / COLUMNS)
    options = {"figsize": (9, 2.1 * rows), "layout": "constrained", "sharex": True, "sharey": True}
    figure, panels = plt.subplots(rows, COLUMNS, **options)
    for axes, name in zip_longest(panels.flat, curves):
        if name is None:
            axes.axis("off")
            continue
        for images, means, _ in (curve for other, curve in curves.items() if other != name):
            axes.plot(images, means, color=GREY, linewidth=0.8)
        plot(axes, curves[name], COLOURS[0])
        axes.set_title(name, fontsize=9, loc="left")
    return figure


def main(out: str, *runs: str) -> None:
    """Write the picture."""
    variants: dict[str, list[Path]] = {}
    for run in map(Path, runs):
        variants.setdefault(re.sub(r"-seed\d+$", "", run.name), []).append(run)
    curves = {name.replace("_", " "): curve_of(several) for name, several in variants.items()}
    figure = plot_together(curves) if len(curves) <= len(COLOURS) else plot_apart(curves)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("images sampled", fontsize=9)
    figure.supylabel(f"mean reward, last {WINDOW} draws", fontsize=9)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])

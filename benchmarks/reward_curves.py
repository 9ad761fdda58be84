# /// script
# dependencies = ["matplotlib", "numpy"]
# ///
"""Plot the mean reward of rollouts over images sampled: `python benchmarks/reward_curves.py OUT.png RUN...`.

A run is a folder with `metrics.jsonl`; runs whose names differ only in `-seedN` share a line. A line is the mean over a
window of draws and over seeds, with a 95 % interval from the spread between draws. With more than four lines, each has
a panel of its own, with the others in grey.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

WINDOW = 16
"""Draws averaged in each point of the line."""
IMAGES_PER_DRAW, UPDATES = 64, 2
"""As in the embedded recipes: `num_prompts` x `images_per_prompt`, and the steps that learn from each draw."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def rewards_of(run: Path) -> np.ndarray:
    """The mean reward of each draw."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    name = next(key for key in rows[0] if key.endswith("/reward"))
    return np.array([row[name] for row in rows if name in row])[::UPDATES]


def curve_of(runs: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images drawn, mean reward and the half width of its interval, a number for each place of the window."""
    drawn = [rewards_of(run) for run in runs]
    drawn = np.array([one[: min(map(len, drawn))] for one in drawn])  # seeds x draws
    windows = np.lib.stride_tricks.sliding_window_view(drawn, WINDOW, axis=1)  # seeds x places x WINDOW
    spread = np.sqrt(windows.var(axis=2, ddof=1).mean(axis=0) / (WINDOW * len(runs)))
    return IMAGES_PER_DRAW * (np.arange(windows.shape[1]) + WINDOW), windows.mean(axis=(0, 2)), 1.96 * spread


def main(out: str, *runs: str) -> None:
    """Write the picture."""
    variants: dict[str, list[Path]] = {}
    for run in map(Path, runs):
        variants.setdefault(re.sub(r"-seed\d+$", "", run.name), []).append(run)
    curves = {name.replace("_", " "): curve_of(several) for name, several in variants.items()}
    apart = len(curves) > len(COLOURS)
    columns = 3 if apart else 1
    rows = -(-len(curves) // columns) if apart else 1
    size = (9, 2.1 * rows) if apart else (7, 3.6)
    figure, panels = plt.subplots(
        rows, columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for place, (name, (images, means, spread)) in enumerate(curves.items()):
        axes = panels.flat[place if apart else 0]
        colour = COLOURS[0] if apart else COLOURS[place]
        for other, (x, y, _) in curves.items() if apart else ():
            if other != name:
                axes.plot(x, y, color="#d1d5db", linewidth=0.8)
        axes.plot(images, means, color=colour, label=name)
        axes.fill_between(images, means - spread, means + spread, color=colour, alpha=0.15)
        if apart:
            axes.set_title(name, fontsize=9, loc="left")
    for unused in panels.flat[len(curves) if apart else 1 :]:
        unused.axis("off")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    if not apart:
        panels[0, 0].legend(frameon=False)
    figure.supxlabel("images sampled", fontsize=9)
    figure.supylabel(f"mean reward, last {WINDOW} draws", fontsize=9)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])

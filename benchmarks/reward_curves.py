# /// script
# dependencies = ["matplotlib", "numpy"]
# ///
"""Plot the mean reward of rollouts over images sampled: `python benchmarks/reward_curves.py OUT.png RUN...`.

A run is a folder with `metrics.jsonl`. Its line is the mean over a window of draws, with a 95 % interval.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

WINDOW = 16
"""Draws averaged in each point of the line."""
IMAGES_PER_DRAW, UPDATES = 64, 2
"""As in the embedded recipes: `num_prompts` x `images_per_prompt`, and the steps that learn from each draw."""


def rewards_of(run: Path) -> np.ndarray:
    """The mean reward of each draw."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    name = next(key for key in rows[0] if key.endswith("/reward"))
    return np.array([row[name] for row in rows if name in row])[::UPDATES]


def main(out: str, *runs: str) -> None:
    """Write the picture."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for run in runs:
        drawn = rewards_of(Path(run))
        means = np.convolve(drawn, np.ones(WINDOW) / WINDOW, mode="valid")
        spread = np.sqrt([drawn[k : k + WINDOW].var(ddof=1) / WINDOW for k in range(len(means))])
        images = IMAGES_PER_DRAW * (np.arange(len(means)) + WINDOW)
        (line,) = axes.plot(images, means, label=Path(run).name.replace("_", " "))
        axes.fill_between(images, means - 1.96 * spread, means + 1.96 * spread, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="images sampled", ylabel=f"mean reward, last {WINDOW} draws")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])

# /// script
# dependencies = ["matplotlib"]
# ///
"""README's picture: alignment and a reward, two axes: `python docs/study/two_axes.py SWEEP OUT.png`.

Left: each model's share of exactly right pictures against their mean sharpness, large for the mean of its seeds, small
for each seed. Right: the same prompts and noise drawn by four of them, framed in green if right, by the adapters of
the first seed, which are in the archive: of each tag the first prompt that the base gets wrong and the stack right.
"""

import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from picture import CURVES
from torch import Tensor

from agsm_rl import load_backbone
from agsm_rl.evaluate.drawing import draw
from agsm_rl.export.attach import attach_to_backbone
from agsm_rl.report.load import Loaded, load
from agsm_rl.report.views import BASE
from agsm_rl.shapes.judge import judge
from agsm_rl.shapes.world import parse

VERDICT, REWARD, GUIDANCE, STEPS = "strict", "sharpness", 2.0, 20
STACK, CONTROL = "agsm_then_ddpo", "score_matching_then_ddpo"
MODELS = {name: CURVES[name] for name in (BASE, "ddpo", "agsm", "score_matching")}
MODELS |= {STACK: ("AGSM, then DDPO", "#d55e00", "^"), CONTROL: ("score matching, then DDPO", "#cc79a7", "P")}
ARROWS = ((BASE, "ddpo"), (BASE, "agsm"), ("agsm", STACK))
DRAWN = (BASE, "ddpo", "agsm", STACK)
TAGS = ("counting", "colors", "two_object", "position", "color_attr")
"""Of each, a held-out prompt is drawn, with the noise that its place in the suite gives."""


def points(loaded: Loaded) -> dict[str, np.ndarray]:
    """Sharpness and share right in percent of each model's seeds, [seeds, 2]; the base has one row."""
    found: dict[str, Any] = {}
    for variant in loaded.variants:
        rows = []
        for run in variant.runs:
            judged = run.evaluation.trained[GUIDANCE]
            rows.append((run.evaluation.score(judged, REWARD), 100 * run.evaluation.score(judged, VERDICT)))
            base = run.evaluation.base[GUIDANCE]
            found[BASE] = np.array([(run.evaluation.score(base, REWARD), 100 * run.evaluation.score(base, VERDICT))])
        found[variant.name] = np.array(rows)
    return found


def scatter(axes: Any, found: dict[str, np.ndarray]) -> None:
    """The models, and arrows for what each objective did."""
    for name, (label, color, marker) in MODELS.items():
        if len(found[name]) > 1:
            axes.scatter(*found[name].T, s=14, color=color, marker=marker, alpha=0.35, linewidths=0)
        axes.scatter(*found[name].mean(axis=0), s=80, color=color, marker=marker, label=label, zorder=3)
    for start, end in ARROWS:
        ends = found[start].mean(axis=0), found[end].mean(axis=0)
        arrow = {"arrowstyle": "->", "color": "#6b7280", "shrinkA": 6, "shrinkB": 7}
        axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=arrow)
    axes.set_xlabel("sharpness of the pictures: the reward that DDPO learns")
    axes.set_ylabel("exactly what was asked (held-out), %")
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)


def pictures(loaded: Loaded, sweep: Path) -> tuple[list[str], list[tuple[str, Tensor, list[bool]]]]:
    """The prompts, and of each model its name, its images [N, 3, H, W], and whether they are right."""
    run = next(variant for variant in loaded.variants if variant.name == STACK).runs[0]
    sides = [judged[GUIDANCE].values[VERDICT] for judged in (run.evaluation.base, run.evaluation.trained)]
    cured = [not before and bool(after) for before, after in zip(*sides, strict=True)]
    tags = [tag if is_cured else None for tag, is_cured in zip(run.evaluation.tags, cured, strict=True)]
    seeds = [tags.index(tag) for tag in TAGS]
    prompts = [run.evaluation.prompts[seed] for seed in seeds]
    backbone = load_backbone("builtin:shapes-sd15")
    rows = []
    for name in DRAWN:
        handle = attach_to_backbone(backbone, sweep / "cells" / f"{name}-seed{run.seed}") if name else None
        images = draw(backbone, prompts, seeds, guidance=GUIDANCE, num_steps=STEPS)
        if handle is not None:
            handle.detach()
        right = [judge(image, parse(prompt)).strict for image, prompt in zip(images, prompts, strict=True)]
        rows.append((MODELS[name][0], images, right))
    return prompts, rows


def main(sweep: str, out: str) -> None:
    """Write the picture."""
    loaded = load([Path(sweep)])
    found = points(loaded)
    prompts, rows = pictures(loaded, Path(sweep))
    figure = plt.figure(figsize=(11, 4.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.05])
    scatter(left.subplots(), found)
    grid = right.subplots(len(rows), len(prompts))
    for line, (label, images, verdicts) in zip(grid, rows, strict=True):
        for axes, image, is_right in zip(line, images, verdicts, strict=True):
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color="#1e963c" if is_right else "#cd2d2d", linewidth=2)
        line[0].set_ylabel(label.replace(", ", ",\n"), fontsize=8, rotation=0, ha="right", va="center")
    for axes, prompt in zip(grid[0], prompts, strict=True):
        axes.set_title("\n".join(wrap(prompt, 17)), fontsize=7.5)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])

# /// script
# dependencies = ["matplotlib"]
# ///
"""The study's main picture, by the report's own estimates: `python docs/study/picture.py SWEEP OUT.png`.

Left: score against guidance, without intervals, because those of single models say nothing about differences. Right:
what AGSM adds to each other objective in counting (the tag with the most requirements among those where anything is
gained), and what that one adds to AGSM, every model at the guidance that was chosen on validation prompts.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from agsm_rl.report.findings import find
from agsm_rl.report.load import load
from agsm_rl.report.views import BASE, make_views

VERDICT, TAG = "strict", "counting"
CURVES = {
    BASE: ("base", "#6b7280", "o"),
    "ddpo": ("DDPO", "#56b4e9", "v"),
    "diffusion_nft": ("DiffusionNFT", "#0072b2", "D"),
    "agsm": ("AGSM", "#009e73", "s"),
    "agsm_plus_ddpo": ("AGSM + DDPO", "#d55e00", "^"),
    "softrepa": ("SoftREPA", "#cc79a7", "P"),
    "score_matching": ("score matching", "#e69f00", "X"),
}
STACKS = {
    "DDPO": ("ddpo", "agsm_plus_ddpo"),
    "Diffusion-DPO": ("diffusion_dpo", "agsm_plus_dpo"),
    "DiffusionNFT": ("diffusion_nft", "agsm_plus_nft"),
}


def main(sweep: str, out: str) -> None:
    """Write the picture."""
    loaded = load([Path(sweep)])
    views, _ = make_views(loaded)
    found = find(loaded, views)
    own, at = views[0], [view for view in views if view.key != "own"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained", width_ratios=[1, 1.05])
    for place, (name, (label, colour, marker)) in enumerate(CURVES.items()):
        scores = [found.score(VERDICT, view, name).overall for view in at]
        x = [view.guidance[name] + 0.03 * (place - 3) for view in at]
        y = [100 * one.value for one in scores]
        left.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.4, label=label)
    left.set_xticks([view.guidance[BASE] for view in at])
    left.set_xlabel("classifier-free guidance")
    left.set_ylabel("exactly right (held-out), mean over tags, %")
    left.legend(fontsize=7.5, ncols=2, frameon=False, loc="lower right")
    left.set_ylim(bottom=18)
    rows = []
    for label, (alone, stack) in STACKS.items():
        rows.append((f"AGSM adds to {label}", found.difference(VERDICT, own, stack, alone), "#009e73"))
        rows.append((f"{label} adds to AGSM", found.difference(VERDICT, own, stack, "agsm"), "#0072b2"))
    for place, (label, change, colour) in enumerate(rows):
        assert change is not None, f"{label}: no seed in common"
        part = change.tags[TAG]
        right.plot([100 * part.low, 100 * part.high], [-place, -place], color=colour, linewidth=2.2)
        right.plot([100 * part.value], [-place], "o", color=colour)
        words = f"{100 * part.value:+.1f} [{100 * part.low:+.1f}, {100 * part.high:+.1f}]".replace("-", "−")
        right.annotate(words, (1.01, -place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    right.axvline(0, color="#6b7280", linewidth=0.8)
    right.set_yticks([-place for place in range(len(rows))], [label for label, _, _ in rows], fontsize=9)
    right.set_xlabel(f"points in {TAG}, stack minus the one alone, 95 % interval")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])

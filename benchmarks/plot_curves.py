# /// script
# dependencies = ["matplotlib", "numpy"]
# ///
"""Plot the curves of benchmarks/curves.py: `uv run benchmarks/plot_curves.py OUT.png [CURVES.json]`.

Both axes are logarithmic. The dotted line is linear growth from the first point or, for processes that share a fixed
batch, the time divided by their number.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

CURVES = Path(__file__).parent / "results" / "curves.json"


def main(out: str, curves: str = str(CURVES)) -> None:
    """Write the picture."""
    measured = json.loads(Path(curves).read_text())["curves"]
    columns = min(4, len(measured))
    rows = -(-len(measured) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.6 * rows), layout="constrained", squeeze=False)
    for place, curve in zip(axes.flat, measured, strict=False):
        x = np.array([point[curve["vary"]] for point in curve["points"]], dtype=float)
        y = np.array([point["seconds"] for point in curve["points"]])
        ideal = y[0] * (x / x[0]) ** (-1.0 if curve["exponent"] < 0 else 1.0)
        place.loglog(x, ideal, ":", color="grey")
        place.loglog(x, y, "o-")
        place.set_xticks(x, [f"{value:g}" for value in x], minor=False)
        ticks = [y[0], ideal[-1], *(y[-1:] if abs(np.log(y[-1] / y[0])) > 0.3 else [])]
        place.set_yticks(ticks, [f"{value:.2g}" for value in ticks], minor=False)
        place.minorticks_off()
        place.set_title(f"{curve['name']}\nexponent {curve['exponent']:.2f}", fontsize=9)
        place.set_ylabel("seconds per step", fontsize=8)
        place.spines[["top", "right"]].set_visible(False)
    for place in list(axes.flat)[len(measured) :]:
        place.set_visible(False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])

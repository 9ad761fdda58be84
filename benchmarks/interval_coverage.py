"""How often do a report's 95 % intervals hold the truth? `python benchmarks/interval_coverage.py SWEEP`

Simulates paired verdicts of two variants: each requirement, each seed and each pair of them has an effect of its own,
as large as it is in the cells of a sweep (docs/study/complementarity, once unpacked), and every image is right or wrong
by chance around that. The truth is the mean effect over all requirements and seeds that could have been drawn. What the
report does now is set against what it did before, a bootstrap over training seeds and prompts. Writes
results/interval_coverage.json and the table of docs/report.md; two minutes on one core.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from agsm_rl.evaluate.intervals_clustered import Clusters, clustered_means
from agsm_rl.report.load import load
from agsm_rl.shapes.world import TAGS

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks" / "results" / "interval_coverage.json", ROOT / "docs" / "report.md"
BLOCK = re.compile(r"(<!-- made by interval_coverage.py -->\n).*?(<!-- end -->)", re.DOTALL)
VERDICT, GUIDANCE = "strict", 2.0
PAIRS = {
    "AGSM minus the base": ("agsm", ""),
    "SoftREPA minus AGSM": ("softrepa", "agsm"),
    "AGSM + DDPO minus AGSM": ("agsm_plus_ddpo", "agsm"),
}
"""A large effect, a middling one, and none."""
SEEDS = (1, 3, 5, 10)
COUNTING = TAGS.index("counting")
WORDINGS = 4
"""Prompts of one requirement, at most."""
ENOUGH = 10
"""Effects are estimated in tags of so many requirements."""
RESAMPLES = 200

Figures = NDArray[np.float64]


@dataclass(frozen=True)
class Design:
    """Each tag's number of requirements, and the images of each requirement; of one tag alone, its place in TAGS."""

    requirements: tuple[int, ...]
    images: tuple[int, ...]
    only: int | None = None


DESIGNS = {
    "20": Design((4, 4, 3, 3, 3, 3), (28,) * 6),
    "60": Design((10,) * 6, (10,) * 6),
    "130": Design((22, 22, 22, 22, 21, 21), (5,) * 6),
    "121, as in the shapes world": Design((4, 2, 16, 2, 56, 41), (20, 40, 12, 40, 1, 2)),
    "its 16 of counting": Design((16,), (12,), COUNTING),
    "162, as in the scenes world": Design((20, 20, 22, 20, 20, 60), (4, 4, 9, 4, 4, 1)),
    "its 22 of counting": Design((22,), (9,), COUNTING),
}
"""By how many requirements there are in all."""


@dataclass(frozen=True)
class Effects:
    """A tag's differences: mean, standard deviation over requirements, seeds and both, share of changed verdicts."""

    mean: float
    requirements: float
    seeds: float
    both: float
    changed: float


@dataclass(frozen=True)
class Drawn:
    """Simulated differences [repeats, seeds, prompts], the layout of the prompts, and the true difference."""

    values: Figures
    tags: Figures
    requirements: Figures
    images: Figures
    truth: float


def effects_of(values: Figures, requirements: Sequence[object]) -> Effects:
    """Of one tag's differences [S, N], by the mean squares of two crossed factors with images within."""
    order: dict[object, int] = {}
    numbers = np.array([order.setdefault(one, len(order)) for one in requirements])
    counts, seeds = np.bincount(numbers), len(values)
    cells = np.stack([np.bincount(numbers, row) / counts for row in values])
    within = float(((values - cells[:, numbers]) ** 2).sum() / max(seeds * (len(numbers) - len(counts)), 1))
    rows, columns = cells.mean(axis=1), cells.mean(axis=0)
    left = cells - rows[:, None] - columns + cells.mean()
    rest = float((left**2).sum() / ((seeds - 1) * (len(counts) - 1)))
    squares = (columns.var(ddof=1) - rest / seeds, rows.var(ddof=1) - rest / len(counts), rest - within / counts.mean())
    parts = [float(np.sqrt(max(part, 0.0))) for part in squares]
    return Effects(float(values.mean()), *parts, float(np.abs(values).mean()))


def effects_in(archive: Path) -> dict[str, list[Effects]]:
    """Each pair's effects by tag. Tags of few requirements have the mean spread of the others."""
    names = sorted({name for pair in PAIRS.values() for name in pair if name})
    loaded = load([cell for name in names for cell in sorted(archive.glob(f"cells/{name}-seed*"))])
    values: dict[str, Figures] = {"": loaded.runs[0].evaluation.base[GUIDANCE].values[VERDICT].astype(float)}
    for variant in loaded.variants:
        verdicts = [run.evaluation.trained[GUIDANCE].values[VERDICT] for run in variant.runs]
        values[variant.name] = np.stack(verdicts).astype(float)
    layout, found = loaded.evaluation.layout, {}
    for label, (one, other) in PAIRS.items():
        change, tags = values[one] - values[other], []
        for name in layout.names:
            rows = layout.rows(name)
            of = [layout.requirements[row] for row in rows]
            tags.append((effects_of(change[:, rows], of), len(set(of)) >= ENOUGH))
        known = [part for part, enough in tags if enough]
        spread = [float(np.mean([getattr(part, kind) for part in known])) for kind in ("requirements", "seeds", "both")]
        found[label] = [part if enough else Effects(part.mean, *spread, part.changed) for part, enough in tags]
    return found


def draw(
    rng: np.random.Generator, effects: Sequence[Effects], design: Design, seeds: int, repeats: int, *, skewed: bool
) -> Drawn:
    """Simulate `repeats` studies. `skewed`: a fifth of the requirements has nearly all of the spread between them."""
    values, tags, requirements, images, truths = [], [], [], [], []
    for tag, (part, count, each) in enumerate(zip(effects, design.requirements, design.images, strict=True)):
        of_requirement = part.requirements * _spread(rng, (repeats, 1, count), skewed)
        of_seed = rng.normal(0, part.seeds, (repeats, seeds, 1))
        effect = part.mean + of_requirement + of_seed + rng.normal(0, part.both, (repeats, seeds, count))
        away = part.requirements * _spread(rng, 200_000, skewed) + rng.normal(
            0, np.hypot(part.seeds, part.both), 200_000
        )
        truths.append(float(np.clip(part.mean + away, -1, 1).mean()))
        wordings = min(WORDINGS, each)
        sizes = np.array([each // wordings + (place < each % wordings) for place in range(wordings)])
        effect = np.repeat(np.clip(effect, -1, 1), wordings, axis=2)
        changed, size = np.maximum(np.abs(effect), part.changed), np.tile(sizes, count)
        gained = rng.binomial(size, (changed + effect) / 2)
        lost_of_rest = np.divide(changed - effect, 2 - changed - effect, out=np.zeros_like(effect), where=effect < 1)
        lost = rng.binomial(size - gained, np.clip(lost_of_rest, 0, 1))
        values.append((gained - lost) / size)
        tags += [tag] * len(size)
        requirements += list(np.repeat(np.arange(count), wordings))
        images.append(size)
    whole = (np.array(tags), np.array(requirements), np.concatenate(images))
    return Drawn(np.concatenate(values, axis=2), *whole, float(np.mean(truths)))


def _spread(rng: np.random.Generator, shape: Any, skewed: bool) -> Figures:
    """Of mean 0 and standard deviation 1."""
    return np.where(rng.random(shape) < 0.2, 2.0, -0.5) if skewed else rng.normal(0, 1, shape)


def clustered(drawn: Drawn) -> Figures:
    """Bounds [repeats, 2] as the report has them now."""
    clusters = Clusters.of(list(drawn.tags), (list(drawn.requirements), range(len(drawn.tags))), list(drawn.images))
    return np.array([(part.low, part.high) for part in clustered_means(drawn.values, clusters).overall])


def bootstrapped(drawn: Drawn, rng: np.random.Generator) -> Figures:
    """Bounds [repeats, 2] as the report had them: seeds and prompts resampled, seeds' deviations widened."""
    seeds, widen = drawn.values.shape[1], np.sqrt(drawn.values.shape[1] / max(drawn.values.shape[1] - 1, 1))
    bounds = []
    for values in drawn.values:
        total = np.zeros(RESAMPLES)
        chosen = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
        for tag in range(int(drawn.tags.max()) + 1):
            rows = np.flatnonzero(drawn.tags == tag)
            weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES) * drawn.images[rows]
            by_seed = (weights / weights.sum(axis=1, keepdims=True)) @ values[:, rows].T
            center = by_seed.mean(axis=1)
            total += center + widen * ((by_seed * chosen).sum(axis=1) - center)
        bounds.append(np.quantile(total / (drawn.tags.max() + 1), [0.025, 0.975]))
    return np.array(bounds)


def share_covered(bounds: Figures, truth: float) -> float:
    """The share of intervals that hold the truth."""
    return float(((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean())


def main(archive: Path, repeats: int = 1000, repeats_before: int = 200) -> None:
    """Simulate everything, and write the result and its table."""
    effects, rows = effects_in(archive), []
    for design_name, design in DESIGNS.items():
        for seeds in SEEDS:
            for pair, of_tags in effects.items():
                parts = of_tags if design.only is None else of_tags[design.only : design.only + 1]
                row: dict[str, Any] = {"requirements": design_name, "seeds": seeds, "pair": pair}
                for skewed in (False, True):
                    drawn = draw(np.random.default_rng(0), parts, design, seeds, repeats, skewed=skewed)
                    bounds, kind = clustered(drawn), "skewed" if skewed else "normal"
                    row[f"{kind}_now"] = share_covered(bounds, drawn.truth)
                    row[f"{kind}_reach"] = float(np.median(bounds[:, 1] - bounds[:, 0]) / 2)
                if seeds > 1:
                    few = draw(np.random.default_rng(1), parts, design, seeds, repeats_before, skewed=False)
                    row["normal_before"] = share_covered(bootstrapped(few, np.random.default_rng(2)), few.truth)
                rows.append(row)
            print(design_name, seeds, *(f"{row['normal_now']:.3f}" for row in rows[-len(effects) :]), flush=True)
    told = {pair: [asdict(part) for part in parts] for pair, parts in effects.items()}
    settings = {"archive": archive.name, "repeats": repeats, "repeats_before": repeats_before, "effects": told}
    RESULT.write_text(json.dumps(settings | {"coverage": rows}, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda block: block[1] + table(rows) + block[2], page), encoding="utf-8")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The coverage as Markdown, from the lowest to the highest of the pairs; before, one seed had no bootstrap."""
    lines = ["| requirements | seeds | bootstrap, before | now | now, skewed | ± points |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((row["requirements"], row["seeds"]) for row in rows):
        alike = [row for row in rows if (row["requirements"], row["seeds"]) == key]
        kinds = ("normal_before", "normal_now", "skewed_now")
        cells = [_range([100 * row[kind] for row in alike if kind in row]) for kind in kinds]
        reach = " / ".join(f"{100 * row['normal_reach']:.1f}" for row in alike)
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} | {reach} |")
    return "\n".join(lines) + "\n"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f} %" if values else ""


if __name__ == "__main__":
    typer.run(main)

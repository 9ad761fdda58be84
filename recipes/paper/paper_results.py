"""The results file: what was measured beside what was published, with all that decides it, in a form to send in.

`collect` makes it from what the commands wrote, `problems_of` checks one (of anybody), `make_tables` sets it out. A
cell's interval is over training seeds (Student's t) where there are several, else the evaluation's, over prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from paper_hashes import disagreements, missing
from paper_plan import ARMS, HERE, NUM_CAPTIONS, NUM_GENEVAL, SUITES, TABLES, TOY_REWARDS, Place, parts_of
from pydantic import BaseModel, ConfigDict, ValidationError

from agsm_rl import __version__
from agsm_rl.errors import UserError

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
SCALES = {"image_reward": 100.0, "hpsv2": 100.0}
"""Figures are printed as the paper does: ImageReward and HPSv2 times 100; CLIP's cosine has its 100 already."""
WANTED = {"coco": NUM_CAPTIONS, "fid": NUM_CAPTIONS, "geneval": NUM_GENEVAL}
"""Images that each figure is made of."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Strict):
    """A seed's figure, with the evaluation's 95 % interval where it has one."""

    seed: int
    value: float
    low: float | None
    high: float | None
    images: int


class Cell(_Strict):
    """A figure of a table: published, and measured over training seeds."""

    table: str
    arm: str
    metric: str
    published: float | None
    scores: list[Score]
    mean: float
    low: float | None
    high: float | None


class Command(_Strict):
    """A command that was run to its end, where, and the SHA-256 of its data and weights (paper_hashes.py)."""

    name: str
    command: list[str]
    seconds: float
    finished: str
    device: str
    revision: str | None
    sha256: dict[str, str] = {}


class Results(_Strict):
    """The file. `revision` is git's, with a + where files were changed; `recipes` are their SHA-256."""

    format: Literal[1]
    toy: bool
    agsm_rl: str
    revision: str | None
    platform: str
    versions: dict[str, str]
    recipes: dict[str, str]
    commands: list[Command]
    cells: list[Cell]
    notes: str = ""


def revision() -> str | None:
    """The checkout's git revision, with a + where files were changed; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device() -> str:
    """The GPUs' names, or CPU."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "CPU"


def hashes() -> dict[str, str]:
    """SHA-256 of each recipe of this folder."""
    return {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(HERE.glob("*.yaml"))}


def collect(place: Place, commands: Sequence[dict[str, Any]], *, tables: Sequence[str]) -> Results:
    """All figures that are there."""
    return Results(
        format=1,
        toy=place.toy,
        agsm_rl=__version__,
        revision=revision(),
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions={name: version(name) for name in PACKAGES},
        recipes=hashes(),
        commands=[Command(**command) for command in commands],
        cells=list(_cells(place, {command["name"] for command in commands}, tables)),
    )


def _cells(place: Place, done: set[str], tables: Sequence[str]) -> Iterator[Cell]:
    for table in tables:
        for arm in (arm for arm in ARMS.values() if table in arm.tables):
            by_metric: dict[str, list[Score]] = {}
            for suite in SUITES[table]:
                for seed, file in _files(place, arm.key, suite):
                    if f"{arm.key}/seed{seed}/{suite}" in done:
                        for metric, score in _scores(json.loads(file.read_text(encoding="utf-8")), suite, seed):
                            by_metric.setdefault(metric, []).append(score)
            for metric in TABLES[table]["metrics"]:
                if scores := sorted(by_metric.get(metric, []), key=lambda score: score.seed):
                    published = TABLES[table]["rows"][arm.published][metric]
                    yield Cell(
                        table=table, arm=arm.key, metric=metric, published=published, scores=scores, **summary(scores)
                    )


def _files(place: Place, arm: str, suite: str) -> Iterator[tuple[int, Path]]:
    for folder in (place.out / arm).glob("seed*"):
        if (file := folder / f"{suite}.json").is_file():
            yield int(folder.name.removeprefix("seed")), file


def _scores(content: dict[str, Any], suite: str, seed: int) -> Iterator[tuple[str, Score]]:
    """The figures of a file of `agsm-rl eval --json`."""
    images = content["num_images"]
    if suite == "fid":
        yield "fid", Score(seed=seed, value=content["overall"], low=None, high=None, images=images)
        return
    rows = {name: row for name, row in content["tags"].items() if row["score"] is not None}
    if suite == "geneval":
        # Images of one prompt are alike, so the interval is over prompts where there is one.
        rows["overall"] = content.get("over_prompts", {}) | {"score": content["overall"]}
    for name, row in ((TOY_REWARDS.get(name, name), row) for name, row in rows.items()):
        scale = SCALES.get(name, 1.0)
        bounds = {key: None if row.get(key) is None else scale * row[key] for key in ("low", "high")}
        yield name, Score(seed=seed, value=scale * row["score"], images=images, **bounds)


def summary(scores: Sequence[Score]) -> dict[str, float | None]:
    """Mean and 95 % interval: over seeds by Student's t, or one seed's own over prompts."""
    values = [score.value for score in scores]
    if len(values) == 1:
        return {"mean": values[0], "low": scores[0].low, "high": scores[0].high}
    from statsmodels.stats.weightstats import DescrStatsW

    low, high = DescrStatsW(values).tconfint_mean()
    return {"mean": mean(values), "low": float(low), "high": float(high)}


def read(text: str, *, where: str) -> Results:
    """A results file whose figures belong together; UserError for any other."""
    try:
        results = Results.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where}: {'; '.join(_mistakes(error))}") from error
    for problem in disagreements((command.name, command.sha256) for command in results.commands):
        raise UserError(f"{where}: {problem}; such figures do not belong in one table, so run one of the two again.")
    return results


def _mistakes(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]


def problems_of(text: str) -> list[str]:
    """What keeps a file from standing beside the published figures; none if it may."""
    try:
        results = Results.model_validate_json(text)
    except ValidationError as error:
        return _mistakes(error)
    problems = ["toy: figures of a toy run say nothing about the paper"] if results.toy else []
    if results.revision is None or results.revision.endswith("+"):
        problems.append(f"revision: {results.revision}; results need a commit without changes")
    problems += [
        f"commands: {command.name} ran at {command.revision}, the file was made at {results.revision}; make it "
        "there, or run the command again"
        for command in results.commands
        if command.revision != results.revision
    ]
    problems += _problems_of_hashes(results)
    changed = [name for name, sha in hashes().items() if results.recipes.get(name) != sha]
    problems += [f"recipes: {name} is not that of this checkout" for name in changed]
    problems += [] if results.cells else ["cells: there is no figure"]
    done, seen = {command.name for command in results.commands}, set[tuple[str, str, str]]()
    for cell in results.cells:
        where = f"{cell.table}, {cell.arm}, {cell.metric}"
        if (cell.table, cell.arm, cell.metric) in seen:
            problems.append(f"{where}: is listed twice")
        seen.add((cell.table, cell.arm, cell.metric))
        problems += [f"{where}: {problem}" for problem in _problems_of_cell(cell, done, toy=results.toy)]
    return problems


def _problems_of_hashes(results: Results) -> Iterator[str]:
    place = Place(out=Path("out"), data=Path("data"), toy=results.toy)
    for command in results.commands:
        name = re.fullmatch(r"(.+)/seed(\d{1,9})/\w+", command.name)
        arm = ARMS.get(name[1]) if name else None
        parts = parts_of(arm, int(name[2]), place, list(TABLES)) if name and arm else []
        part = next((part for part in parts if part.name == command.name), None)
        if part is None:
            yield f"commands: {command.name} is not one that reproduce.py runs"
            continue
        lacking = missing(part, place, command.sha256)
        yield from (f"commands: {command.name} lacks the SHA-256 of {what}" for what in lacking)
    yield from disagreements((command.name, command.sha256) for command in results.commands)


def other_data(files: Mapping[str, str]) -> list[str]:
    """Where results files, given by name, rest on different data; a file that cannot be read is passed over."""
    named: list[tuple[str, dict[str, str]]] = []
    for file, text in files.items():
        with suppress(ValidationError):
            for command in Results.model_validate_json(text).commands:
                data = {name: sha256 for name, sha256 in command.sha256.items() if name.startswith("data/")}
                named.append((f"{command.name} of {file}", data))
    return list(disagreements(named))


def _problems_of_cell(cell: Cell, done: set[str], *, toy: bool) -> Iterator[str]:
    arm = ARMS.get(cell.arm)
    if arm is None or cell.table not in arm.tables or cell.metric not in TABLES[cell.table]["metrics"]:
        yield "the paper has no such figure"
        return
    if cell.published != TABLES[cell.table]["rows"][arm.published][cell.metric]:
        yield f"published: {cell.published}, which published.json does not have"
    suite = "fid" if cell.metric == "fid" else SUITES[cell.table][0]
    for score in cell.scores:
        bounds = [score.low, score.value, score.high]
        if not all(bound is None or math.isfinite(bound) for bound in bounds):
            yield f"seed {score.seed}: a figure is not finite"
        if None not in bounds and bounds != sorted(bounds):  # type: ignore[type-var]
            yield f"seed {score.seed}: {score.value} lies outside its interval"
        if f"{cell.arm}/seed{score.seed}/{suite}" not in done:
            yield f"seed {score.seed}: the command that measured it is missing"
        if not toy and suite in WANTED and score.images != WANTED[suite]:
            yield f"seed {score.seed}: {score.images} images; published with {WANTED[suite]}"
    wanted = summary(cell.scores) if cell.scores else {}
    given = {"mean": cell.mean, "low": cell.low, "high": cell.high}
    if not all(_close(given[key], wanted.get(key)) for key in given):
        yield "mean or interval does not follow from the scores"


def _close(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-9)


def make_tables(results: Results) -> str:
    """Published beside measured, a Markdown table for each of the paper's."""
    lines = ["**A toy run: these figures say nothing about the paper.**", ""] if results.toy else []
    for table, content in TABLES.items():
        cells = {(cell.arm, cell.metric): cell for cell in results.cells if cell.table == table}
        metrics = [metric for metric in content["metrics"] if any(metric == key[1] for key in cells)]
        if not metrics:
            continue
        lines += [f"### {content['title']}", "", "| arm | seeds | " + " | ".join(metrics) + " |"]
        lines += ["|---|---|" + "---|" * len(metrics)]
        for arm in dict.fromkeys(key[0] for key in cells):
            row = [cells.get((arm, metric)) for metric in metrics]
            seeds = max(len(cell.scores) for cell in row if cell)
            lines.append(f"| {arm} | {seeds} | " + " | ".join(_shown(cell) for cell in row) + " |")
        lines += ["", "Published → measured [95 %].", ""]
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    digits = 2 if cell.table != "geneval" else 3
    published = "?" if cell.published is None else f"{cell.published:.2f}"
    bounds = "" if cell.low is None or cell.high is None else f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    return f"{published} → {cell.mean:.{digits}f}{bounds}"

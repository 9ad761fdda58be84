"""One HTML file: what was read and estimated, in a page that fetches nothing.

The page's policy allows no network at all and, of scripts, only the three that are written here, by their hashes: even
if a name or prompt got past the template's escaping, it could not run.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from agsm_rl import __version__
from agsm_rl.errors import UserError
from agsm_rl.evaluate.intervals import Interval
from agsm_rl.files import write_text
from agsm_rl.report import history, recipes
from agsm_rl.report.compare import Estimate
from agsm_rl.report.findings import Findings, find
from agsm_rl.report.headline import headline, reach, signed
from agsm_rl.report.load import Loaded, load
from agsm_rl.report.pictures import pictures, sheets
from agsm_rl.report.views import BASE, GuidanceView, make_views

LIBRARIES = ("assets/d3.min.js", "assets/plot.umd.min.js")
PARTS = ("figures", "looks", "scores", "curves", "page")
"""Of the page's own script, in this order."""
BASE_NAME = "base"


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Write the report of run folders, or of one sweep's folder; UserError when they cannot be compared."""
    # A name or a prompt may hold half a character, which no file can.
    text = render(load(paths)).encode("utf-8", "backslashreplace").decode()
    try:
        write_text(out, text)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another file by -o.") from error


def render(loaded: Loaded) -> str:
    """The page's text."""
    views, notes = make_views(loaded)
    found = find(loaded, views)
    own_script = "\n".join(_own_file(f"scripts/{name}.js") for name in PARTS)
    scripts = [*(_own_file(name) for name in LIBRARIES), own_script]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # tags and verdicts are in their own order
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["points"] = signed
    return environment.from_string(_own_file("page.html.jinja")).render(
        title=loaded.title,
        headline=headline(loaded, views, found),
        reach=reach(loaded),
        notes=[*notes, *loaded.notes],
        data=_in_json(page_data(loaded, views, found)),
        plain=_plain(loaded, views, found),
        evaluated=loaded.evaluated,
        verdict=next(iter(loaded.evaluation.labels.values()), ""),
        sheets=sheets(loaded),
        cells=loaded.cells,
        unused=sum(not cell.used for cell in loaded.cells),
        runs=loaded.runs,
        variants=loaded.variants,
        differences=recipes.differences(loaded),
        recipes=recipes.texts(loaded),
        agreement=[(run.name, sentence) for run in loaded.runs for sentence in run.evaluation.agreement],
        version=__version__,
        css=Markup(_own_file("page.css")),
        scripts=[Markup(script) for script in scripts],
        licences=Markup(_own_file("assets/LICENSES.txt")),
        policy=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
    )


def page_data(loaded: Loaded, views: list[GuidanceView], found: Findings) -> dict[str, Any]:
    """What the page's charts and tables are drawn from: shares and differences of shares, as numbers in [-1, 1]."""
    evaluation, runs = loaded.evaluation, loaded.runs
    return {
        "verdicts": evaluation.labels,
        "tags": {name: evaluation.tags.count(name) for name in evaluation.tag_names},
        "views": [{"key": view.key, "label": view.label, "guidance": _named(view.guidance)} for view in views],
        "variants": [{"name": one.name, "seeds": one.seeds} for one in loaded.variants],
        "scores": [
            {"verdict": verdict, "model": name or BASE_NAME, "base": name == BASE, "guidance": guidance, **_json(value)}
            for (verdict, (name, guidance)), value in found.scores.items()
        ],
        "differences": [
            {"verdict": verdict, "model": one, "guidance": guidance, "minus": other or BASE_NAME}
            | {"base": other == BASE, "minus_guidance": other_guidance, **_json(value)}
            for (verdict, (one, guidance), (other, other_guidance)), value in found.differences.items()
        ],
        "runs": [
            {"name": run.name, "variant": run.variant, "seed": run.seed}
            | {"curves": history.curves(run, runs=len(runs)), "evaluations": history.evaluations(run)}
            | {"rewards": history.trained_rewards(run)}
            for run in runs
        ],
        "pictures": _with_named_base(pictures(loaded)),
    }


def _in_json(value: Any) -> Any:
    """The same without NaN and infinities, which are no JSON: one would leave the whole page empty."""
    if isinstance(value, dict):
        return {key: _in_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _named(guidance: dict[str, float]) -> dict[str, Any]:
    return {"base": guidance[BASE], "variants": {name: value for name, value in guidance.items() if name != BASE}}


def _with_named_base(found: dict[str, Any]) -> dict[str, Any]:
    shown = {
        guidance: {"base": models.get(BASE), "variants": {name: rows for name, rows in models.items() if name != BASE}}
        for guidance, models in found["shown"].items()
    }
    return found | {"shown": shown}


def _json(part: Estimate) -> dict[str, Any]:
    return {
        "overall": _numbers(part.overall),
        "tags": {name: _numbers(one) for name, one in part.tags.items()},
        "by_seed": [_rounded(value) for value in part.by_seed],
    }


def _numbers(part: Interval) -> list[float]:
    return [_rounded(part.value), _rounded(part.low), _rounded(part.high)]


def _rounded(value: float) -> float:
    return round(value, 6)


def _plain(loaded: Loaded, views: list[GuidanceView], found: Findings) -> list[dict[str, Any]]:
    """The main figures for readers without scripts: by view, a row a model."""
    tables = []
    for view in views:
        verdict = loaded.evaluation.verdicts[0]
        base = found.score(verdict, view, BASE).overall
        rows: list[tuple[str, float, Interval, Interval | None]] = [(BASE_NAME, view.guidance[BASE], base, None)]
        for variant in loaded.variants:
            change = found.difference(verdict, view, variant.name)
            score = found.score(verdict, view, variant.name).overall
            rows.append((variant.name, view.guidance[variant.name], score, change.overall if change else None))
        tables.append({"label": view.label, "rows": rows})
    return tables


def _own_file(name: str) -> str:
    return files("agsm_rl.report").joinpath(*name.split("/")).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

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
from agsm_rl.report.endpoints import Answer, answers
from agsm_rl.report.findings import Findings, find
from agsm_rl.report.gradient_maps import gradient_maps
from agsm_rl.report.headline import answered_headline, headline, reach
from agsm_rl.report.load import Loaded, load
from agsm_rl.report.overview import Suites, overview
from agsm_rl.report.pictures import pictures, sheets
from agsm_rl.report.texts import change_text, value_text
from agsm_rl.report.views import BASE, GuidanceView, make_views

LIBRARIES = ("assets/d3.min.js", "assets/plot.umd.min.js")
PARTS = ("figures", "looks", "scores", "curves", "pictures", "page")
"""Of the page's own script, in this order."""
BASE_NAME = "base"
GENERATOR = b'<meta name="generator" content="agsm-rl '
"""Near the beginning of every report."""


def write_report(paths: Sequence[Path], out: Path, primary: Path | None = None) -> None:
    """Write the report of run folders, or of one sweep's folder; UserError when they cannot be compared.

    `primary` is a file of a study's primary endpoints, which the report then answers.
    """
    loaded = load(paths)
    answered = [] if primary is None else answers(primary, loaded)
    # A name or a prompt may hold half a character, which no file can.
    text = render(loaded, answered).encode("utf-8", "backslashreplace").decode()
    try:
        write_text(out, text)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another file by -o.") from error


def is_report(file: Path) -> bool:
    """Whether a file is a report, of whatever version, which may be written again."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return GENERATOR in opened.read(2000)


def render(loaded: Loaded, answered: Sequence[Answer] = ()) -> str:
    """The page's text."""
    suites = {name: _of_suite(loaded.of(name)) for name in loaded.suites}
    first, views, found = suites[loaded.suites[0]] if suites else (loaded, [], Findings())
    own_script = "\n".join(_own_file(f"scripts/{name}.js") for name in PARTS)
    scripts = [*(_own_file(name) for name in LIBRARIES), own_script]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # tags and scores are in their own order
    return environment.from_string(_own_file("page.html.jinja")).render(
        title=loaded.title,
        headline=answered_headline(answered) if answered else headline(first, views, found),
        reach=reach(first),
        notes=_notes(loaded),
        answers=answered,
        overview=overview(loaded, suites),
        data=_in_json(page_data(loaded, suites)),
        plain=_plain(first, views, found),
        evaluated=loaded.evaluated,
        score=next(iter(first.evaluation.scores.values()), None),
        sheets=sheets(loaded),
        cells=loaded.cells,
        unused=sum(not cell.used for cell in loaded.cells),
        runs=loaded.all_runs,
        variants=loaded.all_variants,
        differences=recipes.differences(loaded),
        recipes=recipes.texts(loaded),
        agreement=[(run.name, sentence) for run in loaded.all_runs for sentence in run.evaluation.agreement],
        maps=gradient_maps(loaded.all_runs),
        version=__version__,
        css=Markup(_own_file("page.css")),
        scripts=[Markup(script) for script in scripts],
        licences=Markup(_own_file("assets/LICENSES.txt")),
        policy=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
    )


def _of_suite(loaded: Loaded) -> tuple[Loaded, list[GuidanceView], Findings]:
    views, _ = make_views(loaded)
    return loaded, views, find(loaded, views)


def _notes(loaded: Loaded) -> list[str]:
    """What a reader should know: of each suite's guidance and runs, and of what was not understood."""
    notes = [note for name in loaded.suites for note in (*make_views(loaded.of(name))[1], *loaded.of(name).notes)]
    return list(dict.fromkeys([*notes, *(note for run in loaded.all_runs for note in run.notes)]))


def page_data(loaded: Loaded, suites: Suites) -> dict[str, Any]:
    """What the page's charts and tables are drawn from: shares as numbers in [0, 1], differences of them in [-1, 1]."""
    runs = loaded.all_runs
    return {
        "suites": [_suite_data(name, *suite) for name, suite in suites.items()],
        "variants": [{"name": one.name, "seeds": one.seeds} for one in loaded.all_variants],
        "runs": [
            {"name": run.name, "variant": run.variant, "seed": run.seed}
            | {"curves": history.curves(run, runs=len(runs)), "rewards": history.trained_rewards(run)}
            | {"evaluations": {name: history.evaluations(run, name) for name in run.suites}}
            for run in runs
        ],
    }


def _suite_data(name: str, loaded: Loaded, views: Sequence[GuidanceView], found: Findings) -> dict[str, Any]:
    evaluation = loaded.evaluation
    return {
        "name": name if name == evaluation.suite else f"{name} ({evaluation.suite})",
        "key": name,
        "scores": {key: {"label": score.label, "share": score.share} for key, score in evaluation.scores.items()},
        "tags": {tag: evaluation.tags.count(tag) for tag in evaluation.tag_names if tag},
        "views": [{"key": view.key, "label": view.label, "guidance": _named(view.guidance)} for view in views],
        "estimates": [
            {"score": score, "model": model or BASE_NAME, "base": model == BASE, "guidance": guidance, **_json(value)}
            for (score, (model, guidance)), value in found.scores.items()
        ],
        "differences": [
            {"score": score, "model": one, "guidance": guidance, "minus": other or BASE_NAME}
            | {"base": other == BASE, "minus_guidance": other_guidance, **_json(value)}
            | {"wins": _numbers(found.wins[key]) if key in found.wins else None}
            for key, value in found.differences.items()
            for score, (one, guidance), (other, other_guidance) in [key]
        ],
        "pictures": _with_named_base(pictures(loaded)),
    }


def _in_json(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not have: one would leave the whole page empty."""
    if isinstance(value, dict):
        return {key: _in_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _named(guidance: dict[str, float]) -> dict[str, Any]:
    variants = {name: value for name, value in guidance.items() if name != BASE}
    return {"base": guidance.get(BASE), "variants": variants}


def _with_named_base(found: dict[str, Any]) -> dict[str, Any]:
    shown = {
        guidance: {"base": models.get(BASE), "variants": {name: rows for name, rows in models.items() if name != BASE}}
        for guidance, models in found["shown"].items()
    }
    return found | {"shown": shown}


def _json(part: Estimate) -> dict[str, Any]:
    return {
        "overall": _numbers(part.overall),
        "tags": {name: _numbers(one) for name, one in part.tags.items() if name},
        "by_seed": [_rounded(value) for value in part.by_seed],
    }


def _numbers(part: Interval) -> list[float]:
    return [_rounded(part.value), _rounded(part.low), _rounded(part.high)]


def _rounded(value: float) -> float:
    """To six digits, and to six decimals where that keeps them all."""
    return round(value, 6) if abs(value) >= 0.1 else float(f"{value:.6g}")


def _plain(loaded: Loaded, views: list[GuidanceView], found: Findings) -> list[dict[str, Any]]:
    """The main figures for readers without scripts: by view, one row per model."""
    tables = []
    for view in views:
        key, score = next(iter(loaded.evaluation.scores.items()))
        rows = []
        for name, guidance in view.guidance.items():
            change = found.difference(key, view, name)
            reached = value_text(score, found.score(key, view, name).overall)
            rows.append((name or BASE_NAME, guidance, reached, change_text(score, change.overall) if change else ""))
        tables.append({"label": view.label, "rows": rows})
    return tables


def _own_file(name: str) -> str:
    return files("agsm_rl.report").joinpath(*name.split("/")).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

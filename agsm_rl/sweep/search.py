"""Axes that are ranges: Optuna suggests values, cells run with them, and Optuna gets their validation scores.

All axes are searched; named variants and lists are categorical. A trial is one choice on all axes, run on every seed;
its value is the mean over seeds. Trials are kept in search.log (Optuna's journal). A trial that was interrupted or
failed is repeated with the same values, so its cells continue from their checkpoints. Trials with equal values share
their cells.
"""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.files import replacing
from agsm_rl.recipe.earlier import evaluation_of_today
from agsm_rl.recipe.parts import Parts
from agsm_rl.sweep.board import rank, shown_value
from agsm_rl.sweep.plan import Cell, Plan, make_cell
from agsm_rl.sweep.runner import Runner
from agsm_rl.sweep.settings import what_it_measures
from agsm_rl.sweep.spec import Axis

DIGITS = 4
"""Suggested numbers are rounded to this many significant digits, so that a cell's name contains the exact value."""
SETTINGS = "settings"
"""The study's attribute that holds all that its trials' values depend on."""
RETRIED = "queued again"
"""The study's attribute with the numbers of trials that were queued again."""


def check_installed() -> None:
    """Raise a UserError if Optuna is missing, before anything runs."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("search: Optuna is not installed; run `pip install 'agsm-rl[optuna]'`.") from error


def search(runner: Runner) -> None:
    """Run the trials that are missing, several at once if the executor has room."""
    import optuna
    from optuna.trial import FrozenTrial, TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan, options = runner.plan, runner.plan.sweep.search
    assert options is not None
    study = _open_study(runner)
    _check_settings(study, runner)
    known: list[FrozenTrial] = study.get_trials(deepcopy=False)
    # A new sampler starts its random numbers over: with the same seed, it would repeat its earlier suggestions.
    study.sampler = optuna.samplers.TPESampler(seed=(options.seed + len(known)) % 2**32, constant_liar=True)
    _retry(study, [trial for trial in known if trial.state in (TrialState.RUNNING, TrialState.FAIL)])
    done = [trial for trial in known if trial.state == TrialState.COMPLETE]
    for trial in done:
        runner.run(_cells(runner, {axis.key: _suggest(trial, axis) for axis in plan.axes}))

    def objective(trial: Any) -> float:
        cells = _cells(runner, {axis.key: _suggest(trial, axis) for axis in plan.axes})
        runner.run(cells)
        if runner.stopping:
            raise RuntimeError("the sweep was stopped")
        scores = [_score(runner, cell) for cell in cells]
        return mean(score for score in scores if score is not None) if None not in scores else float("nan")

    parallel_trials = max(1, runner.executor.capacity // len(plan.sweep.seed_list))
    study.optimize(objective, n_trials=max(0, options.trials - len(done)), n_jobs=parallel_trials)
    if [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]:
        best = {axis.key: _suggest(study.best_trial, axis) for axis in plan.axes}
        value = study.best_value if plan.ranked_by[1] else -study.best_value
        shown = shown_value(plan, value)
        runner.board.extra["best"] = {"axes": best, "value": value}
        runner.board.log(f"best on {options.split}: {best}, {options.maximise} {shown}")


def _open_study(runner: Runner) -> Any:
    """The study in search.log. One that is damaged is moved aside and begun anew: the finished cells stay.

    A new search with the same seed suggests the same values as the first session did, so it finds those cells done.
    """
    file = runner.plan.folder / "search.log"
    _drop_torn_line(file)
    try:
        return _study(file, runner.plan.name)
    except OSError:
        raise
    except Exception as error:  # Optuna replays the lines as they are, and fails in any way
        number = next(n for n in count(1) if not os.path.lexists(file.with_name(f"search.log.damaged-{n}")))
        aside = file.rename(file.with_name(f"search.log.damaged-{number}"))
        runner.board.log(
            f"{file}: is damaged ({type(error).__name__}: {error!s:.100}); it is kept as {aside.name}, and the search "
            "begins anew. Finished cells stay, and count where their values are suggested again."
        )
        return _study(file, runner.plan.name)


def _study(file: Path, name: str) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(file)))
    study = optuna.create_study(study_name=name, direction="maximize", storage=storage, load_if_exists=True)
    kept = study.user_attrs.get(SETTINGS, {"evaluate": []})
    if not isinstance(kept, dict) or not isinstance(kept["evaluate"], list):
        raise TypeError(f"its settings are {kept!r}")
    return study


def _drop_torn_line(file: Path) -> None:
    """Cut off a last line that a kill left unfinished: the next one would be written behind it, and both be lost."""
    if not file.exists():
        return
    content = file.read_bytes()
    if not content.endswith(b"\n"):
        with replacing(file) as aside:
            aside.write_bytes(content[: content.rfind(b"\n") + 1])


def _check_settings(study: Any, runner: Runner) -> None:
    """Raise a UserError if the sweep has changed since the study's first trial: old values would not be comparable."""
    given = runner.plan.to_data()
    search = {key: given["search"].get(key) for key in ("maximise", "split", "guidance")}
    now = {key: given.get(key) for key in ("recipe", "set", "axes", "seeds", "budget", "evaluate")} | {"search": search}
    now = json.loads(json.dumps(now, default=str))
    now["evaluate"] = [what_it_measures(data) for data in now["evaluate"]]
    kept = study.user_attrs.get(SETTINGS)
    if kept is not None:
        kept = kept | {"evaluate": _of_today(kept["evaluate"], runner.plan)}
    for key, value in now.items():
        if kept is not None and kept[key] != value:
            raise UserError(
                f"{runner.plan.folder}: its search was started with a different `{key}`, so it cannot be continued; "
                "choose another --dir. (Only `search.trials` may be increased.)"
            )
    study.set_user_attr(SETTINGS, now)


def _of_today(evaluations: list[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Evaluations of an earlier version, completed with the options that were added since."""
    parts = Parts(where=f"{plan.folder}: search.log", allow_imports=plan.allow_imports)
    today = [evaluation_of_today(data, parts).model_dump(mode="json", exclude={"every"}) for data in evaluations]
    return [what_it_measures(data) for data in today]


def _retry(study: Any, trials: list[Any]) -> None:
    """Queue interrupted and failed trials again with the same values, once each."""
    from optuna.trial import TrialState

    retried = study.user_attrs.get(RETRIED, [])
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.number not in retried and trial.params:
            study.enqueue_trial(trial.params)
    study.set_user_attr(RETRIED, [*retried, *(trial.number for trial in trials)])


def _cells(runner: Runner, choice: dict[str, Any]) -> list[Cell]:
    return [make_cell(runner.plan, choice, seed) for seed in runner.plan.sweep.seed_list]


def _suggest(trial: Any, axis: Axis) -> Any:
    """A trial's value on an axis."""
    if axis.range is None:
        names = list(axis.variants) or [str(index) for index in range(len(axis.values))]
        picked = trial.suggest_categorical(axis.key, names)
        return picked if axis.variants else axis.values[int(picked)]
    low, high, log = axis.range.low, axis.range.high, axis.range.log
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(axis.key, low, high, log=log)
    return float(f"{trial.suggest_float(axis.key, low, high, log=log):.{DIGITS}g}")


def _score(runner: Runner, cell: Cell) -> float | None:
    """A cell's score; None if it failed."""
    options, result = runner.plan.sweep.search, runner.board.states[cell.name].result
    assert options is not None
    if result is None:
        return None
    rows = [row for row in result["evaluations"] if row["split"] == options.split]
    if options.guidance is not None:
        rows = [row for row in rows if row["guidance"] == options.guidance]
    return max(rank(runner.plan, row) for row in rows)

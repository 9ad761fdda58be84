"""Axes that are ranges: Optuna suggests, cells are run, and what they score on the validation split is told to it.

Every axis takes part, named variants and lists as choices. A trial is one choice on all axes, run on every seed; its
value is the mean over seeds. Trials are kept in search.log (Optuna's journal). One that was broken off or failed is
tried again with the same values, so its cells go on from their checkpoints; trials of equal values share their cells.
"""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.recipe.earlier import evaluation_of_today
from agsm_rl.recipe.parts import Parts
from agsm_rl.sweep.plan import Cell, Plan, make_cell
from agsm_rl.sweep.runner import Runner
from agsm_rl.sweep.spec import Axis

DIGITS = 4
"""Suggested numbers are rounded to so many, so that a cell's name tells the value in full."""
SETTINGS = "settings"
"""What the values of a study's trials hang on, kept with it."""


def check_installed() -> None:
    """UserError where Optuna is missing, before anything runs."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("search: Optuna is not installed; run `pip install 'agsm-rl[optuna]'`.") from error


def search(runner: Runner) -> None:
    """Run as many trials as are still to be made, several at once where the executor has room."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan, options = runner.plan, runner.plan.sweep.search
    assert options is not None
    study = optuna.create_study(
        study_name=plan.name,
        direction="maximize",
        storage=JournalStorage(JournalFileBackend(str(plan.folder / "search.log"))),
        load_if_exists=True,
    )
    _check_settings(study, runner)
    known: list[FrozenTrial] = study.get_trials(deepcopy=False)
    # A sampler begins its random numbers anew in each session: with the same seed it would suggest the same again.
    study.sampler = optuna.samplers.TPESampler(seed=(options.seed + len(known)) % 2**32, constant_liar=True)
    _queue_again(study, [trial for trial in known if trial.state in (TrialState.RUNNING, TrialState.FAIL)])
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

    at_once = max(1, runner.executor.capacity // len(plan.sweep.seed_list))
    study.optimize(objective, n_trials=max(0, options.trials - len(done)), n_jobs=at_once)
    if [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]:
        best = {axis.key: _suggest(study.best_trial, axis) for axis in plan.axes}
        runner.board.extra["best"] = {"axes": best, "value": study.best_value}
        runner.board.tell(f"best on {options.split}: {best}, {options.maximise} {100 * study.best_value:.1f} %")


def _check_settings(study: Any, runner: Runner) -> None:
    """UserError when the sweep has changed since the study's first trial, whose values would be another sweep's."""
    given = runner.plan.to_data()
    search = {key: given["search"].get(key) for key in ("maximise", "split", "guidance")}
    now = {key: given.get(key) for key in ("recipe", "set", "axes", "seeds", "budget", "evaluate")} | {"search": search}
    now = json.loads(json.dumps(now, default=str))
    kept = study.user_attrs.get(SETTINGS)
    if kept is not None:
        kept = kept | {"evaluate": _of_today(kept["evaluate"], runner.plan)}
    for key, value in now.items():
        if kept is not None and kept[key] != value:
            raise UserError(
                f"{runner.plan.folder}: its search was begun with another `{key}`, so its trials cannot be gone on "
                "with; choose another --dir. (`search.trials` may grow.)"
            )
    study.set_user_attr(SETTINGS, now)


def _of_today(evaluations: list[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Kept evaluations, with the options that came in since they were kept."""
    parts = Parts(where=f"{plan.folder}: search.log", allow_imports=plan.allow_imports)
    return [evaluation_of_today(data, parts).model_dump(mode="json", exclude={"every"}) for data in evaluations]


def _queue_again(study: Any, trials: list[Any]) -> None:
    """Have trials that were broken off or failed tried again with the same values, each once."""
    from optuna.trial import TrialState

    before = study.user_attrs.get("queued again", [])
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.number not in before and trial.params:
            study.enqueue_trial(trial.params)
    study.set_user_attr("queued again", [*before, *(trial.number for trial in trials)])


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
    """What a cell scored; None when it failed."""
    options, result = runner.plan.sweep.search, runner.board.states[cell.name].result
    assert options is not None
    if result is None:
        return None
    rows = [row for row in result["evaluations"] if row["split"] == options.split]
    if options.guidance is not None:
        rows = [row for row in rows if row["guidance"] == options.guidance]
    return max(float(row[options.maximise]) for row in rows)

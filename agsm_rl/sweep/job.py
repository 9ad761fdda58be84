"""A cell as plain data for the process that runs it, and the result that this process writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from agsm_rl.errors import UserError
from agsm_rl.evaluate.kept_files import read_kept, warn_damaged
from agsm_rl.files import write_text
from agsm_rl.recipe.options import explain
from agsm_rl.recipe.yaml_file import read_yaml
from agsm_rl.sweep.kept import Result, Trained
from agsm_rl.sweep.plan import Cell, Plan
from agsm_rl.sweep.settings import Settings, limit_of, same_settings


@dataclass(frozen=True)
class Job:
    """All that is needed to train and evaluate a cell. Paths are kept as they were given to the sweep.

    `starts` are the settings of the trainings that the cell continues: those of the cells it descends from, by name.
    """

    cell: str
    run: str
    base: str
    recipe: dict[str, Any]
    evaluations: list[dict[str, Any]]
    reported: str | None
    seconds: float | None
    allow_imports: list[str]
    starts: dict[str, Settings] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """Everything that affects the cell's figures."""
        return Settings(self.recipe, limit_of(self.recipe, self.seconds), self.evaluations, self.reported)

    def write(self, file: Path) -> None:
        """Write the job to a file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True, width=120))

    @staticmethod
    def read(file: Path) -> Job:
        """The job in a file, possibly written by an earlier version; UserError if it is not a job."""
        known = {field.name for field in fields(Job)}
        content = {key: value for key, value in read_yaml(file, "job").items() if key in known}
        try:
            return TypeAdapter(Job).validate_python(content)
        except ValidationError as error:
            raise explain(error, where=f"{file}: ") from error


def job_of(plan: Plan, cell: Cell) -> Job:
    """The job of a cell."""
    return Job(
        cell=cell.name,
        run=str(plan.run(cell.name)),
        base=str(plan.folder / "base"),
        recipe=cell.recipe.to_data(),
        evaluations=[evaluation.model_dump(mode="json") for evaluation in plan.evaluations],
        reported=plan.reported_split,
        seconds=cell.seconds,
        allow_imports=sorted(plan.allow_imports),
        starts={start.name: _training_of(start) for start in plan.starts(cell)},
    )


def _training_of(cell: Cell) -> Settings:
    recipe = cell.recipe.to_data() | {"evaluate": None}
    return Settings(recipe, limit_of(recipe, cell.seconds), [], None)


def read_result(run: Path, job: Job) -> dict[str, Any] | None:
    """cell.json of a finished cell; None if it is not finished, or was finished with other settings."""
    content = read_kept(run / "cell.json", Result)
    if content.get("settings") is None:
        return None
    try:
        then = Settings.from_json(content["settings"])
    except UserError as error:
        warn_damaged(run / "cell.json", str(error))
        return None
    return content if same_settings(job.settings, then, allow_imports=job.allow_imports) else None


def kept_starts(plan: Plan, cell: Cell) -> dict[str, Settings]:
    """The settings that the cells which this one descends from had when it was trained, by name.

    They are unknown, and left out, of a cell that has not been started, or that an earlier version trained.
    """
    run, job = plan.run(cell.name), plan.folder / "jobs" / f"{cell.name}.yaml"
    for name, shape in (("cell.json", Result), ("trained.json", Trained)):
        kept = read_kept(run / name, shape, warn=False)
        if kept:
            starts = kept.get("starts") or {}
            try:
                return {start: Settings.from_json(settings) for start, settings in starts.items()}
            except UserError as error:
                warn_damaged(run / name, str(error))
    if not (run / "recipe.yaml").is_file() or not job.is_file():
        return {}
    try:
        return Job.read(job).starts
    except UserError:  # it is damaged, and will be written again
        return {}

"""A cell as plain data for the process that runs it, and what that process leaves when the cell is finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from agsm_rl.files import write_text
from agsm_rl.sweep.plan import Cell, Plan


@dataclass(frozen=True)
class Job:
    """All that is needed to train and evaluate a cell. Folders are as the sweep was given them."""

    cell: str
    run: str
    base: str
    recipe: dict[str, Any]
    evaluations: list[dict[str, Any]]
    reported: str | None
    seconds: float | None
    allow_imports: list[str]

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the cell's figures."""
        content = [repr(self.recipe), self.training_limit, self.evaluations, self.reported]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def training_limit(self) -> dict[str, Any]:
        """Until when it trains."""
        return {"steps": self.recipe["steps"], "seconds": self.seconds}

    def write(self, file: Path) -> None:
        """Write it to a file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True, width=120))

    @staticmethod
    def read(file: Path) -> Job:
        """The job in a file, which may be an earlier version's."""
        known = {field.name for field in fields(Job)}
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Job(**{key: value for key, value in content.items() if key in known})


def job_of(plan: Plan, cell: Cell) -> Job:
    """The job of a cell."""
    return Job(
        cell=cell.name,
        run=str(plan.run(cell.name)),
        base=str(plan.folder / "base"),
        recipe=cell.recipe.to_data(),
        evaluations=[one.model_dump(mode="json") for one in plan.evaluations],
        reported=plan.reported_split,
        seconds=cell.seconds,
        allow_imports=sorted(plan.allow_imports),
    )


def read_result(run: Path, fingerprint: str | None = None) -> dict[str, Any] | None:
    """cell.json of a finished cell; None when it is not finished, or was finished under other settings."""
    file = run / "cell.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if fingerprint in (None, found["fingerprint"]) else None

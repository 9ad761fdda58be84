"""How a run shows its evaluations: a line during training, tables and pictures at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from agsm_rl.evaluate.before_after import picture
from agsm_rl.evaluate.drawing import write_picture
from agsm_rl.evaluate.measured import Compared, Measured
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.screen import styled

Suites = Mapping[str, Sequence[Compared]]
"""What was measured: by the suites' names, at each guidance."""


def summary(base: Measured, trained: Measured, step: int, roles: Mapping[str, str] | None = None) -> str:
    """One line: overall scores and rewards of both models."""
    before, after = base.figures(), trained.figures()
    parts = [f"{_with_role(key, trained, roles or {})} {before[key]:.3f} -> {after[key]:.3f}" for key in after]
    suite = "" if trained.entry.made.alone else f" of {trained.entry.name}"
    return f"evaluation{suite} after step {step}, guidance {trained.guidance:g} (base -> trained): {', '.join(parts)}"


def _with_role(key: str, measured: Measured, roles: Mapping[str, str]) -> str:
    role = roles.get(measured.entry.made.key(key.removeprefix("reward/"))) if key.startswith("reward/") else None
    return key if role is None else f"{key} ({role.replace('_', ' ')})"


def print_tables(suites: Suites, options: Evaluate, roles: Mapping[str, str], console: Console) -> None:
    """Each suite's table and that of the rewards beside it, for each guidance."""
    suffix = f" followed by “{options.prompt_suffix}”" if options.prompt_suffix else ""
    for name, of_suite in suites.items():
        for base, trained in of_suite:
            prompts = f"{options.split} prompts" if options.suites is None else f"suite {name}"
            console.rule(styled(f"guidance {trained.guidance:g}, {prompts}{suffix}"))
            trained.result.show(console, base.result, labels=("base", "trained"))
            if trained.rewards:
                console.print(reward_table(base, trained, roles))


def reward_table(base: Measured, trained: Measured, roles: Mapping[str, str]) -> Table:
    """Mean rewards of both models; those that are trained on come first."""
    table = Table(title="mean rewards", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("reward", "", "base", "trained", "difference"):
        table.add_column(column, justify="right" if column in ("base", "trained", "difference") else "left")
    role_of = {name: roles[trained.entry.made.key(name)] for name in trained.rewards}
    for name, value in sorted(trained.rewards.items(), key=lambda item: role_of[item[0]], reverse=True):
        before = base.rewards[name]
        cells = [f"{before:.4g}", f"{value:.4g}", f"{value - before:+.4g}"]
        table.add_row(name, "trained on" if role_of[name] == "trained" else "held out", *cells)
    return table


def write_pictures(suites: Suites, samples: Path) -> None:
    """before_after.png of the first suite at the first guidance, and the first images of both models, for the report.

    The latter are eval/guidance-<g>/{base,trained}/<row in eval.json>.png for the first suite, and
    eval/<suite>/guidance-<g>/… for the others.
    """
    for index, (name, of_suite) in enumerate(suites.items()):
        if index == 0 and of_suite[0][0].pictures:
            write_picture(before_after(*of_suite[0]), samples / "before_after.png")
        for base, trained in of_suite:
            place = samples / "eval" / ("" if index == 0 else name) / f"guidance-{trained.guidance:g}"
            for model, measured in (("base", base), ("trained", trained)):
                for row, image in measured.pictures.items():
                    write_picture(image, place / model / f"{row:04d}.png")


def before_after(base: Measured, trained: Measured) -> Any:
    """The suite's first prompts as drawn by both models, framed by the strictest verdict, if there is one."""
    shown = [row for row in base.pictures if row in trained.pictures]
    before, after = base.to_json()["images"], trained.to_json()["images"]
    prompts = [str(before[row]["prompt"]) if row < len(before) else "" for row in shown]
    right = [(_verdict(before, row), _verdict(after, row)) for row in shown]
    return picture(prompts, [base.pictures[row] for row in shown], [trained.pictures[row] for row in shown], right)


def _verdict(rows: Sequence[Mapping[str, Any]], row: int) -> bool | None:
    content = rows[row] if row < len(rows) else {}
    verdict = content.get("strict", content.get("correct"))
    return verdict if isinstance(verdict, bool) else None

"""How a run shows its evaluations: a line during training, tables and pictures at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from agsm_rl.evaluate.drawing import to_picture, write_picture
from agsm_rl.evaluate.table import picture, print_table
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.measurement import SHOWN, Compared, Measured
from agsm_rl.run.screen import styled


def summary(base: Measured, trained: Measured, step: int, roles: Mapping[str, str] | None = None) -> str:
    """One line: overall scores and rewards of both models."""
    before, after = base.figures(), trained.figures()
    parts = [f"{_with_role(key, roles or {})} {before[key]:.3f} -> {after[key]:.3f}" for key in after]
    return f"evaluation after step {step}, guidance {trained.guidance:g} (base -> trained): {', '.join(parts)}"


def _with_role(key: str, roles: Mapping[str, str]) -> str:
    role = roles.get(key.removeprefix("reward/")) if key.startswith("reward/") else None
    return key if role is None else f"{key} ({role.replace('_', ' ')})"


def print_tables(compared: list[Compared], options: Evaluate, roles: Mapping[str, str], console: Console) -> None:
    """The suite's table and that of the rewards, for each guidance."""
    for base, trained in compared:
        suffix = f" followed by “{options.prompt_suffix}”" if options.prompt_suffix else ""
        console.rule(styled(f"guidance {trained.guidance:g}, {options.split} prompts{suffix}"))
        print_table(base.result, trained.result, console=console)
        if trained.rewards:
            console.print(reward_table(base.rewards, trained.rewards, roles))


def reward_table(base: Mapping[str, float], trained: Mapping[str, float], roles: Mapping[str, str]) -> Table:
    """Mean rewards of both models; those that are trained on come first."""
    table = Table(title="mean rewards", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("reward", "", "base", "trained", "difference"):
        table.add_column(column, justify="right" if column in ("base", "trained", "difference") else "left")
    for name, value in sorted(trained.items(), key=lambda item: roles[item[0]], reverse=True):
        cells = [f"{base[name]:.4g}", f"{value:.4g}", f"{value - base[name]:+.4g}"]
        table.add_row(name, "trained on" if roles[name] == "trained" else "held out", *cells)
    return table


def write_pictures(compared: list[Compared], samples: Path) -> None:
    """before_after.png at the first guidance, and the first images of both models at each guidance, for the report.

    The latter are eval/guidance-<g>/{base,trained}/<number of the prompt>.png.
    """
    write_picture(before_after(*compared[0]), samples / "before_after.png")
    for base, trained in compared:
        folder = samples / "eval" / f"guidance-{trained.guidance:g}"
        for name, measured in (("base", base), ("trained", trained)):
            for index, image in enumerate(measured.images):
                write_picture(to_picture(image), folder / name / f"{index:04d}.png")


def before_after(base: Measured, trained: Measured) -> Any:
    """The suite's first prompts as drawn by both models, framed by the strict verdict."""
    rows = list(zip(base.result.verdicts, trained.result.verdicts, strict=True))[:SHOWN]
    right = [(before.strict, after.strict) for before, after in rows]
    return picture([before.prompt for before, _ in rows], base.images, trained.images, right)

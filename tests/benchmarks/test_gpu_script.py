"""The commands of benchmarks/gpu.sh and goals.py, which run rarely and elsewhere, are ones that their scripts take."""

import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import goals
import pytest
import table
import typer

SCRIPT = Path(table.HERE) / "gpu.sh"


def listing(*arguments: str) -> list[list[str]]:
    """The words of each part: name, seconds, script, arguments."""
    done = subprocess.run(["bash", str(SCRIPT), "--list", *arguments], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def parse(script: str, arguments: list[str]) -> dict[str, Any]:
    """A script's options from its arguments, without running it; click's UsageError where it has no such option."""
    app = typer.Typer(add_completion=False)
    app.command()(import_module(script.removesuffix(".py")).main)
    return typer.main.get_command(app).make_context(script, list(arguments)).params


@pytest.mark.parametrize("size", ["full", "toy"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_part_is_a_command_that_its_script_takes(size, device):
    parts = listing("--size", size, "--device", device)
    assert len({name for name, *_ in parts}) == len(parts) > 10
    for _, _, script, *arguments in parts:
        parse(script, [*arguments, "--results", "results"])


def test_the_trial_has_the_parts_of_the_measurement_in_the_same_order():
    assert [name for name, *_ in listing()] == [name for name, *_ in listing("--size", "toy", "--device", "cpu")]


def results_of(script: str, options: dict[str, Any]) -> list[str]:
    """The names of the results that a script writes."""
    name, device = script.removesuffix(".py"), options.get("device", "cpu")
    if name == "full_size":
        return [f"{name}_{kind}_{device}" for kind in options["kinds"]]
    return [f"{name}_{options.get('size', 'embedded')}_{device}{options.get('tag', '')}"]


def test_the_parts_fill_every_line_of_the_table_that_waits_for_a_gpu():
    results = {result for _, _, script, *words in listing() for result in results_of(script, parse(script, words))}
    lines = {*(row.result for row in table.ROWS), *table.FULL_SIZES, *table.SHALLOW}
    assert {line for line in lines if "_cuda" in line} == results


def test_one_part_can_be_chosen_and_an_unknown_one_is_refused():
    assert [name for name, *_ in listing("--only", "ddpo")] == ["ddpo"]
    done = subprocess.run(["bash", str(SCRIPT), "--list", "--only", "dppo"], capture_output=True, text=True)
    assert done.returncode == 2 and "--only dppo: one of agsm " in done.stderr


@pytest.mark.parametrize("size", ["arguments", "toy"])
def test_every_goal_of_a_cpu_is_measured_by_a_command_that_its_script_takes(size):
    written = {f"{name.replace(' ', '_')}_cpu" for name in goals.COMMANDS}
    for part in goals.PARTS.values():
        options = parse(part.script, [*getattr(part, size).split(), "--results", "results"])
        written |= set(results_of(part.script, options))
    wanted = {row.result for row in table.ROWS if row.goal and "_cuda" not in row.result}
    assert written == wanted - {"busy_neighbour"}, "busy_neighbour.py is started by hand"

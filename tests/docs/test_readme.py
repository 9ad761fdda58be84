"""What the README prints must work: its commands, its recipe, its Python, its links and its figures."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from agsm_rl.cli import app
from agsm_rl.evaluate.target import open_target
from agsm_rl.registry import BUILTIN

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDY = (ROOT / "docs" / "study" / "README.md").read_text(encoding="utf-8")

MAIN_JOB = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . && "
    ".venv/bin/agsm-rl train recipes/agsm_plus_ddpo.yaml"
)
TESTS = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt tox && .venv/bin/tox"

SMALL = {
    "train": (
        *("--set", "steps=2", "--set", "evaluate.num_images=6", "--set", "evaluate.guidance=[1.0]"),
        *("--set", "sources.own_images.num_prompts=2", "--set", "sources.own_images.images_per_prompt=2"),
        *("--set", "objectives.0.weight={0: 1, 1: 0}", "--set", "objectives.1.weight={0: 0, 1: 1}"),
    ),
    "sample": ("--num-steps", "2"),
    "eval": ("--num-images", "6", "--num-steps", "2"),
}
"""What makes a command small enough for a test; everything else runs as printed."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """Every command line of the README, without the comment behind it."""
    lines = (line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines())
    return [line for line in lines if line]


def test_the_readme_is_short():
    (recipe,), (script,) = blocks("yaml"), blocks("python")
    assert len(README.splitlines()) <= 150
    assert len(recipe.splitlines()) <= 14
    assert len(script.splitlines()) <= 12


def test_every_command_is_run_by_a_test_or_is_one_of_the_two_main_ones():
    others = [command for command in commands() if not command.startswith("agsm-rl ")]
    assert others == [MAIN_JOB, TESTS]


def test_what_the_two_main_commands_name_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "agsm-rl" in project["project"]["scripts"]
    for name in ("constraints.txt", "recipes/agsm_plus_ddpo.yaml", "tox.ini"):
        assert (ROOT / name).is_file()


@pytest.mark.slow
def test_the_recipe_and_the_commands_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks("yaml")
    Path("mine.yaml").write_text(recipe, encoding="utf-8")
    for command in commands():
        program, name, *arguments = shlex.split(command)
        if program != "agsm-rl":
            continue
        result = CliRunner().invoke(app, [name, *arguments, *SMALL.get(name, ())])
        assert result.exit_code == 0, (command, result.output)
    assert len(list(Path("pictures").glob("*.png"))) == 4
    for name in ("adapter", "metrics.jsonl", "report.html", "samples/before_after.png"):
        assert (Path("runs/mine") / name).exists()


@pytest.mark.slow
def test_the_python_script_runs_and_keeps_what_it_trained(tmp_path, monkeypatch):
    (script,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(script, scope)  # the README is ours
    assert scope["trainer"].step == 2
    kept = open_target("mine").handle.adapters
    for name, parameter in scope["policy"].parameters().items():
        adapter, _, key = name.partition(".")
        stored = kept["pytorch_lora_weights" if adapter == "lora" else adapter]
        assert torch.equal(dict(stored.named_parameters())[key], parameter)


def test_the_files_and_folders_it_links_to_and_names_are_there():
    linked = {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if "://" not in link}
    named = set(re.findall(r"`?((?:recipes|docs|agsm_rl|benchmarks)/[\w/.-]*)", README))
    assert linked and named
    assert [name for name in linked | named if not (ROOT / name).exists()] == []


def test_the_table_of_objectives_lists_every_one_that_is_registered():
    table = README.partition("## Objectives")[2].partition("\n## ")[0]
    first_cells = "\n".join(re.findall(r"^\| (.*?) \|", table, re.M))  # kin share a row
    assert sorted(re.findall(r"\[`(\w+)`\]", first_cells)) == sorted(BUILTIN["objectives"])


def test_every_finding_stands_in_the_study():
    plain_study = " ".join(STUDY.split())
    intervals = re.findall(r"[+−]\d+\.\d \[[^]]+\]", README)
    assert len(intervals) >= 4
    assert [interval for interval in intervals if interval not in plain_study] == []


def test_a_finding_claims_a_difference_only_where_its_interval_excludes_zero():
    findings = re.findall(r"^\d\. \*\*(.*?)\*\*(.*)$", README.partition("## Four findings")[2], re.M)
    assert len(findings) == 4
    for claim, rest in findings:
        low, high = (float(one.replace("−", "-")) for one in re.findall(r"\[([^,]+), ([^\]]+)\]", rest)[0])
        assert ("no visible difference" in claim) == (low <= 0 <= high), claim

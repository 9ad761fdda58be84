"""The guides' worked examples run: their files are written, their commands executed, their tests passed."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from agsm_rl.cli import app

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
EXAMPLES = sorted(page.stem for page in GUIDES.glob("*.md"))
pytestmark = pytest.mark.slow

SMALL = {"sample": ("--num-steps", "2"), "eval": ("--num-images", "6", "--num-steps", "2")}
"""What makes a command small enough for a test; recipes are cut down by `shrunk`."""


def shrunk(recipe: str) -> str:
    """The recipe with two steps, six images for each evaluation, and few for each draw."""
    content = yaml.safe_load(recipe)
    content["steps"] = min(content["steps"], 2)
    if "evaluate" in content:
        content["evaluate"] |= {"num_images": 6}
    for source in content.get("sources", {}).values():
        if source["use"] == "rollouts":
            source |= {"num_prompts": 2, "num_steps": 2}
    return yaml.safe_dump(content)


def files_of(page: str) -> dict[str, str]:
    """The files that a page gives, by the titles of its blocks."""
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', page, re.S | re.M))


def commands_of(page: str) -> list[list[str]]:
    """The commands of a page's bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.S | re.M)
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("guide", EXAMPLES)
def test_a_guide_s_example_runs_as_printed(guide, tmp_path, monkeypatch):
    page = (GUIDES / f"{guide}.md").read_text(encoding="utf-8")
    for name, text in files_of(page).items():
        (tmp_path / name).write_text(shrunk(text) if name.endswith(".yaml") else text, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        (tmp_path / "recipes" / recipe.name).write_text(shrunk(recipe.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for program, *arguments in commands_of(page):
        if program == "agsm-rl":
            result = CliRunner().invoke(app, [*arguments, *SMALL.get(arguments[0], ())])
            assert result.exit_code == 0, (arguments, result.output, result.exception)
        else:
            assert program == "python", f"{program} is not run by this test"
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    if tests := [name for name in files_of(page) if name.startswith("test_")]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:]

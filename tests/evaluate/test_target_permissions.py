"""`sample` and `eval` open a run: its own classes only with --allow-import, its files only where they lie in it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from own_classes import MODULE
from typer.testing import CliRunner

from agsm_rl.cli.commands import app


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[..., Any]:
    """Run `agsm-rl …` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("part", ["backbone", "adapter"])
def test_a_run_with_the_user_s_own_class_is_opened_only_with_leave(command, tiny_checkpoint, tmp_path, part):
    module = f"my_{part}"  # a module of its own for each case: Python imports one only once
    (tmp_path / f"{module}.py").write_text(MODULE.format(module=module))
    recipe = {
        "steps": 1,
        "backbone": {
            "use": f"{module}:MyBase" if part == "backbone" else "stable_diffusion",
            "checkpoint": str(tiny_checkpoint),
            "device": "cpu",
        },
        "adapters": {"mine": {"use": f"{module}:MyLoRA" if part == "adapter" else "lora", "rank": 2}},
        "objectives": [
            {
                "use": "score_matching",
                "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2, "num_images": 4},
            }
        ],
        "sample": {"num_images": 1, "num_steps": 1},
        "track": [],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    trained = command("train", "mine.yaml", "--run-dir", "run", "--allow-import", module)
    assert trained.exit_code == 0, trained.output
    for words in (
        ["sample", "run", "a red star", "--num-steps", "1", "-o", "drawn"],
        ["eval", "run", "--num-images", "2", "--num-steps", "1"],
        ["eval", "run", "--num-images", "2", "--num-steps", "1", "--images", "kept"],
    ):
        refused = command(*words)
        assert refused.exit_code == 2 and f"--allow-import {module}" in refused.stderr, refused.output
        allowed = command(*words, "--allow-import", module)
        assert allowed.exit_code == 0, allowed.output
    assert [file.name for file in Path("drawn").iterdir()] == ["seed-0.png"]


@pytest.mark.parametrize("name", ["recipe.yaml", "adapter"])
def test_a_run_whose_files_are_links_out_of_its_folder_is_not_opened(command, tmp_path, name):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "adapter").mkdir(parents=True)
    (elsewhere / "recipe.yaml").write_text("backbone: {use: stable_diffusion, checkpoint: builtin:shapes-sd15}\n")
    run.mkdir()
    shutil.copy(elsewhere / "recipe.yaml", run)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(elsewhere / name)
    result = command("sample", str(run), "a red star")
    assert result.exit_code == 2 and f"{name}: is a link out of its folder" in result.stderr

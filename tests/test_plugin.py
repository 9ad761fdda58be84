"""A package of somebody else's adds objectives, rewards and sources by its entry points alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PACKAGE = Path(__file__).parent / "plugin_package"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the example package is installed into."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(PACKAGE, source)  # building writes beside the sources
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(source)]
    subprocess.run(install, check=True)
    return folder


@pytest.fixture
def command(site, tmp_path):
    """Run `agsm-rl ...` in an empty folder where the package is installed."""

    def run(*arguments, path=(site,)):
        return subprocess.run(
            [sys.executable, "-m", "agsm_rl", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )

    return run


def recipe(checkpoint, *, objective="absolute_error"):
    """The package's objective on its source, beside DDPO on its reward."""
    rollouts = {
        "use": "rollouts",
        "prompts": "builtin:shapes-prompts",
        "rewards": {"redness": 1.0},
        "num_prompts": 2,
        "images_per_prompt": 2,
        "num_steps": 2,
    }
    return {
        "steps": 2,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "objectives": [
            {"use": objective, "scale": 2.0, "source": {"use": "plain_colors", "batch_size": 3}},
            {"use": "ddpo", "source": rollouts},
        ],
        "track": [],
    }


def test_its_names_are_listed_and_train_in_a_recipe(command, tiny_checkpoint, tmp_path):
    listed = command("list")
    assert listed.returncode == 0, listed.stderr
    for name in ("absolute_error", "redness", "plain_colors"):
        assert any(name in line and "[agsm-rl-example]" in line for line in listed.stdout.splitlines()), listed.stdout
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_checkpoint)))
    trained = command("train", path, "--run-dir", "run")
    assert trained.returncode == 0, trained.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert rows[-1]["absolute_error/loss"] > 0
    assert any("redness" in name for name in rows[-1])


def test_a_wrong_option_of_its_objective_is_told_as_any_other_is(command, tiny_checkpoint, tmp_path):
    content = recipe(tiny_checkpoint)
    content["objectives"][0]["scael"] = content["objectives"][0].pop("scale")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    result = command("check", path)
    assert result.returncode == 2
    assert "scael" in result.stderr and "Traceback" not in result.stderr


def test_without_an_entry_point_its_code_needs_leave(command, site, tiny_checkpoint, tmp_path):
    """`use: module:Class` runs only with --allow-import; without it nothing of the module is imported."""
    (tmp_path / "apart.py").write_text(
        "from pathlib import Path\nPath('imported').touch()\nfrom agsm_rl_example.objective import AbsoluteError\n"
    )
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_checkpoint, objective="apart:AbsoluteError")))
    refused = command("train", path, "--run-dir", "run")
    assert refused.returncode == 2
    assert "--allow-import apart" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "imported").exists() and not (tmp_path / "run").exists()
    allowed = command("train", path, "--run-dir", "run", "--allow-import", "apart")
    assert allowed.returncode == 0, allowed.stderr
    assert (tmp_path / "imported").exists()


def test_two_packages_with_one_name_are_refused_and_both_are_named(command, site, tmp_path):
    other = tmp_path / "other" / "another_package-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: another-package\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[agsm_rl.objectives]\nabsolute_error = elsewhere:AbsoluteError\n")
    result = command("list", path=(site, other.parent))
    assert result.returncode == 2
    for word in ("absolute_error", "agsm-rl-example", "another-package"):
        assert word in result.stderr

"""What commands load before they answer, which decides how long a short one takes."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "datasets", "accelerate", "scipy", "numpy")
LIGHT = [["--help"], ["list"], ["list", "--json"], ["list", "term"], ["check", "mine.yaml", "--set", "stepz=1"]]
MISSPELT = ["objectives.0.use=agsn", "objectives.0.temprature=1", "objectives.0.source.batch_size=many"]
DISTILLING = "use: opd, teacher: ./gone, source: {use: rollouts, prompts: builtin:shapes-prompts}"
UNUSED = ("skimage", "statsmodels", "agsm_rl.backbones.flux_2", "diffusers.pipelines.flux2", "ray")


def loaded_by(arguments, modules, folder):
    """Which of the modules `agsm-rl …` loads, started in a process of its own in a folder; and its exit code."""
    code = "\n".join(
        [
            "import sys, agsm_rl.cli.commands",
            f"try: agsm_rl.cli.commands.app({arguments!r})",
            f"except SystemExit as end: print(end.code, *sorted(set(sys.modules) & set({modules!r})), file=sys.stderr)",
        ]
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    exit_code, *loaded = told.stderr.strip().splitlines()[-1].split()
    return int(exit_code), loaded


@pytest.mark.parametrize("arguments", [*LIGHT, ["train", "gone.yaml"], ["sweep", "mine.yaml"], ["init", "-h"]])
def test_listing_names_and_refusing_a_misspelt_key_load_no_heavy_library(recipe, tmp_path, arguments):
    assert loaded_by(arguments, HEAVY, tmp_path)[1] == []


@pytest.mark.parametrize("mistake", MISSPELT)
def test_a_mistake_within_a_block_is_refused_before_torch_is_loaded(recipe, tmp_path, mistake):
    assert loaded_by(["check", "mine.yaml", "--set", mistake], HEAVY, tmp_path) == (2, [])


@pytest.mark.parametrize("missing", ["backbone.checkpoint=./gone", f"objectives=[{{{DISTILLING}}}]"])
def test_a_missing_base_or_teacher_is_refused_before_diffusers_is_loaded(recipe, tmp_path, missing):
    arguments = ["check", "mine.yaml", "--set", missing]
    assert loaded_by(arguments, ("diffusers", "transformers", "peft"), tmp_path) == (2, [])


def test_check_loads_nothing_that_its_recipe_does_not_use(recipe, tmp_path):
    assert loaded_by(["check", "mine.yaml"], UNUSED, tmp_path) == (0, [])

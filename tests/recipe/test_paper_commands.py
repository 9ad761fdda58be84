"""Every command that the page on the paper's tables prints and its script runs is one that agsm-rl understands."""

import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import paper_costs
import pytest
import reproduce
import typer
import yaml
from paper_plan import ARMS, HERE, REWARDS, TABLES, Place, all_parts, write_rewards
from paper_results import collect
from typer.testing import CliRunner

from agsm_rl import registry
from agsm_rl.cli import app
from agsm_rl.evaluate.suite_process import SuiteProcess
from agsm_rl.recipe.options import validated
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.yaml_file import read_yaml

PLACE = Place(out=Path("out"), data=Path("data"))


@pytest.fixture
def understood(users_data, tmp_path, monkeypatch):
    """Run an `agsm-rl` command up to where its work would begin; what is wrong with it fails the test.

    All options are read, a recipe with its --set, a suite with its rewards and prompts, the backbone's options. No
    weights are there, so nothing is loaded, drawn or trained.
    """
    begun: list[str] = []

    def begin(name):
        def stop(*_, **__):
            begun.append(name)
            raise typer.Exit

        return stop

    def begin_eval(suite, options):
        if suite.name == "rewards":
            suite.prompts()
        validated(backbone_class(begun[0]), {"checkpoint": "x"} | options.backbone, where="--backbone: ")
        begin("eval")()

    monkeypatch.setattr("agsm_rl.run.lifecycle.train", begin("train"))
    monkeypatch.setattr("agsm_rl.doctor.memory.predict.predict", begin("check"))
    monkeypatch.setattr("agsm_rl.export.convert.convert", begin("convert"))
    monkeypatch.setattr(SuiteProcess, "begin", staticmethod(begin_eval))
    for arm in ARMS.values():
        if arm.released:
            (tmp_path / "data" / arm.released).mkdir(parents=True)
    (tmp_path / "data" / "long_prompts.csv").write_text("index,prompt_en\n0,a red circle\n")
    (tmp_path / "recipes").symlink_to(HERE.parent)

    def run(command, model):
        begun[:] = [model]
        result = CliRunner().invoke(app, list(command[1:]))
        assert (result.exit_code, begun[-1]) == (0, command[1]), (shlex.join(command), result.output)

    return run


@cache
def backbone_class(model: str) -> Any:
    use = read_yaml(HERE / f"{model}_agsm.yaml")["backbone"]["use"]
    return registry.load("backbones", use, where="backbone.use")


@pytest.mark.parametrize("toy", [False, True], ids=["full", "toy"])
def test_agsm_rl_understands_every_command_that_the_script_runs(toy, understood):
    place = replace(PLACE, toy=toy)
    write_rewards(place)
    parts = all_parts(place, tables=list(TABLES), arms=list(ARMS), seeds=1)
    assert {part.arm for part in parts} == set(ARMS)
    for part in parts:
        part.makes.parent.mkdir(parents=True, exist_ok=True)
        understood(part.command, ARMS[part.arm].model)


def printed_commands() -> list[list[str]]:
    """The words of each command of the page's blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", paper_costs.PAGE.read_text(encoding="utf-8"), re.S | re.M)
    lines = re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_every_command_of_the_page_is_understood(understood, monkeypatch):
    monkeypatch.setattr(reproduce, "run_all", lambda parts, place, run: place.out)
    monkeypatch.setattr(reproduce, "prepare", lambda coco, data: None)
    Path("runs/paper").mkdir(parents=True)
    Path("runs/paper/results.json").write_text(collect(PLACE, [], tables=[]).model_dump_json())
    programs = []
    for program, *words in printed_commands():
        programs.append(program)
        if program == "agsm-rl":
            understood((program, *words), "sd15")
        elif program == "python":
            assert (HERE.parents[1] / words[0]).samefile(reproduce.__file__)
            with pytest.raises(SystemExit) as ended:
                reproduce.main(words[1:])
            # A file without figures may not be sent in.
            assert ended.value.code in ((1,) if words[1] == "check" else (0, None)), words
        elif program == "echo":
            text, arrow, file = words
            assert yaml.safe_load(text) == REWARDS and arrow == ">"
            Path(file).write_text(text)
    assert set(programs) == {"pip", "python", "echo", "agsm-rl"}


def test_the_page_names_no_option_that_is_not_there():
    groups = [typer.main.get_command(program) for program in (app, reproduce.app)]
    commands = [command for group in groups for command in group.commands.values()]
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", paper_costs.PAGE.read_text(encoding="utf-8")))
    assert named <= known and len(named) > 20


@pytest.mark.parametrize("recipe", sorted(file.stem for file in HERE.glob("*.yaml")))
def test_a_recipe_takes_what_its_header_and_the_page_would_set(recipe, users_data):
    header = re.sub(r"\n# *", " ", (HERE / f"{recipe}.yaml").read_text(encoding="utf-8").partition("\nseed:")[0])
    page = paper_costs.PAGE.read_text(encoding="utf-8")
    sets = [text.rstrip(".,;)") for text in re.findall(r"--set ([\w.]+=[^\s`]+)", header + page)]
    assert len(sets) >= 5
    Path("path").mkdir()  # what the headers call the place of the data
    for text in sets:
        Recipe.from_yaml(HERE / f"{recipe}.yaml", [text])

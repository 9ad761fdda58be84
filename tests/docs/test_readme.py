"""What the README prints must work."""

import re
from pathlib import Path

import pytest
import torch

from agsm_rl.evaluate.target import open_target

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_readme_s_python_script_runs(tmp_path, monkeypatch):
    script, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(script, scope)  # the README is ours
    assert scope["trainer"].step == 2
    kept = open_target("mine", base="builtin:shapes-sd15").handle.adapters
    for name, parameter in scope["policy"].parameters().items():
        adapter, _, key = name.partition(".")
        found = kept["pytorch_lora_weights" if adapter == "lora" else adapter]
        assert torch.equal(dict(found.named_parameters())[key], parameter)


def test_the_readme_names_only_recipes_that_are_there():
    named = set(re.findall(r"recipes/[\w/]+\.yaml", README))
    assert named
    assert all((Path(__file__).parents[2] / name).is_file() for name in named)

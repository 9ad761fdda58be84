"""What the README prints must work."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_readme_s_python_script_runs():
    script, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    scope: dict = {}
    exec(script, scope)  # the README is ours
    assert scope["trainer"].step == 2


def test_the_readme_names_only_recipes_that_are_there():
    named = set(re.findall(r"recipes/[\w/]+\.yaml", README))
    assert named
    assert all((Path(__file__).parents[1] / name).is_file() for name in named)

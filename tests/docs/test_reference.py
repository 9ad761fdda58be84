"""The pages that are made from code say what the code says, and leave nothing unexplained."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from agsm_rl import registry

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MADE = runpy.run_path(str(DOCS / "make_reference.py"))["pages"]()


@pytest.mark.parametrize("name", MADE)
def test_a_reference_page_is_current(name):
    file = DOCS / "reference" / name
    written = file.read_text(encoding="utf-8") if file.exists() else ""
    assert written == MADE[name], f"{file} is not what the code says; run: python docs/make_reference.py"


def test_no_reference_page_is_left_over():
    assert {file.name for file in (DOCS / "reference").iterdir()} == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_every_row_of_a_reference_page_has_a_meaning(name):
    rows = [line for line in MADE[name].splitlines() if line.startswith("| `")]
    assert rows or name == "views.md"
    # A reader of the page cannot see another class.
    assert not [row for row in rows if re.search(r"\|\s*(See [A-Z]\w+\.)?\s*\|$", row)]


def test_every_registered_name_is_on_the_page_of_its_kind():
    for kind in registry.KINDS:
        headings = set(re.findall(r"^## (\w+)$", MADE[f"{kind}.md"], re.M))
        assert headings == set(registry.BUILTIN[kind])


def test_every_key_of_the_example_recipes_is_on_the_recipe_page():
    keys = set(re.findall(r"^\| `(\w+)`", MADE["recipe.md"], re.M))
    for file in (ROOT / "recipes").glob("*.yaml"):
        assert set(yaml.safe_load(file.read_text(encoding="utf-8"))) <= keys

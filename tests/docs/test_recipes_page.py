"""The table of recipes lists every shipped one, as its header says, and says openly what nobody has measured."""

import re
import runpy
from pathlib import Path

import pytest

from agsm_rl.recipe.shipped import header_of, shipped_recipes, shipped_sweeps

ROOT = Path(__file__).parents[2]
MAKER = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))
PAGES = MAKER["pages"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_table_of_recipes_is_current(page):
    written = page.read_text(encoding="utf-8") if page.exists() else ""
    assert written == PAGES[page], f"{page} is not what the headers say; run: python docs/make_recipes.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_shipped_recipe_and_sweep_has_one_row(page):
    rows = re.findall(r"^\| \[([\w/]+)\]\(", PAGES[page], re.M)
    assert sorted(rows) == sorted([*shipped_recipes(), *shipped_sweeps()])


def test_the_readme_leads_to_the_table():
    assert "(recipes/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_says_what_it_takes(name):
    assert header_of(shipped_recipes()[name]).hardware


def header(tmp_path, *lines):
    file = tmp_path / "one.yaml"
    file.write_text("\n".join([*lines, "seed: 0", "# Result:   of another place"]), encoding="utf-8")
    return header_of(file)


def test_a_header_is_read_with_its_continued_lines(tmp_path):
    title = ("# A thing (arXiv 1.2), which", "# shows much. And more.", "# Command:  agsm-rl train one.yaml")
    found = header(tmp_path, *title, "# Hardware: a GPU.", "# Time:     an", "#           hour.", "# Result:   1 -> 2")
    assert (found.title, found.hardware) == ("A thing (arXiv 1.2), which shows much.", "a GPU.")
    assert (found.time, found.result) == ("an hour.", "1 -> 2")


@pytest.mark.parametrize("line", ["# Hardware: a GPU.", "# Time and result: not measured by us."])
def test_what_has_no_result_is_not_measured(tmp_path, line):
    assert header(tmp_path, "# A thing.", line).result == "not measured by us"


def test_published_figures_are_not_taken_for_measured_ones(tmp_path):
    line = "# Result:   published on COCO-5K: CLIP 26.40 -> 27.23. Not measured by us."
    assert header(tmp_path, "# A thing.", line).result == "not measured by us; published figures in its header"


def test_a_folder_without_a_purpose_is_refused():
    with pytest.raises(SystemExit, match="recipes/new_model is new: say in FOLDERS"):
        MAKER["heading_of"](ROOT / "recipes" / "new_model" / "ddpo.yaml")

"""The site's navigation is whole, and what checks the built site (in tox's `docs`) sees what it is there for."""

import runpy
from pathlib import Path

import pytest
import yaml

from agsm_rl import registry

ROOT = Path(__file__).parents[2]
CHECKS = runpy.run_path(str(ROOT / "docs" / "check_site.py"))
link_problems, nav_problems = CHECKS["link_problems"], CHECKS["nav_problems"]


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")


def test_every_page_is_in_the_navigation_once():
    assert nav_problems(ROOT / "mkdocs.yml") == []


def test_every_objective_has_a_page_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(CHECKS["nav_pages"](settings["nav"]))
    assert {f"objectives/{name}.md" for name in registry.BUILTIN["objectives"]} <= listed


def test_a_page_outside_the_navigation_is_reported(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in ("index.md", "lost.md"):
        (tmp_path / "docs" / page).touch()
    config = tmp_path / "mkdocs.yml"
    config.write_text("nav: [index.md, {Guides: [{Gone: gone.md}]}]", encoding="utf-8")
    assert nav_problems(config) == [
        "docs/lost.md is missing from nav in mkdocs.yml",
        "mkdocs.yml: nav names gone.md, which is not in docs/",
    ]


def test_links_that_lead_somewhere_pass(tmp_path):
    (tmp_path / "guide").mkdir()
    elsewhere = '<a href="https://example.com/no">x</a><link rel="next" href="https://example.com">'
    write(tmp_path, index=f'<h1 id="top">x</h1><a href="guide/#first">x</a>{elsewhere}')
    write(
        tmp_path / "guide", index='<h2 id="first">x</h2><a href="../#top">x</a><a href="..">x</a><a href="#first">x</a>'
    )
    assert link_problems(tmp_path) == []


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ('<a href="gone/">x</a>', "index.html: gone/ leads to nothing"),
        ('<img src="gone.png">', "index.html: gone.png leads to nothing"),
        ('<a href="#gone">x</a>', "index.html: #gone: there is no such heading"),
        ('<script src="//example.com/x.js"></script>', "index.html: fetches //example.com/x.js"),
        ('<link rel="stylesheet" href="//example.com/x.css">', "index.html: fetches //example.com/x.css"),
        ('<link rel="next" href="gone/">', "index.html: gone/ leads to nothing"),
    ],
)
def test_a_link_that_leads_nowhere_is_reported(tmp_path, page, problem):
    write(tmp_path, index=page)
    assert link_problems(tmp_path) == [problem]

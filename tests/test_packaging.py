"""What a public project says about itself: a version, pinned tools, a citation. `tox -e dist` builds the packages."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

import agsm_rl

ROOT = Path(__file__).parents[1]


def pinned():
    """The versions in constraints.txt, by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_metadata_and_the_package_have_one_version():
    assert version("agsm-rl") == agsm_rl.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_importing_the_package_imports_nothing_heavy():
    script = "import sys, agsm_rl; print(agsm_rl.__version__, *sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "diffusers", "pydantic", "yaml", "typer"}.isdisjoint(modules)


def test_pre_commit_runs_the_versions_that_ci_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    used = {name for repo in config["repos"] for hook in repo["hooks"] for name in hook["additional_dependencies"]}
    assert used == {f"{name}=={pinned()[name]}" for name in ("ruff", "pre-commit-hooks")}


def test_the_citation_names_the_project_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["repository-code"] == project["urls"]["Homepage"]
    assert citation["license"] == project["license"]
    [paper] = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Lee", "Hong", "Kwon", "Ye"]
    assert paper["url"].endswith(re.search(r"\d{4}\.\d{5}", paper["identifiers"][0]["value"]).group())


def test_issue_forms_ask_for_the_versions_the_recipe_and_the_message():
    for name in ("bug", "question"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        fields = {field["id"]: field["attributes"] for field in form["body"] if "id" in field}
        assert {"version", "recipe", "message"} <= fields.keys()
        assert "agsm-rl --version" in fields["version"]["description"]

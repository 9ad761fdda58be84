"""The tables of docs/study/README.md are those of the archives beside it."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from newer_versions import change_options

from agsm_rl.recipe.shipped import header_of, shipped_recipes, shipped_sweeps
from agsm_rl.sweep.first_version import add_settings
from agsm_rl.sweep.job import job_of, read_result
from agsm_rl.sweep.plan import make_plan

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs" / "study"
PAGES = ["docs/study/tables.py", "docs/study/figures.yaml", "docs/study/questions.yaml"]
PAGES += ["docs/study/two_axes_questions.yaml"]
PAGES += ["docs/study/README.md", "docs/study/scenes.md"]
PAGES += ["README.md", "docs/results.md", "docs/limits.md", "docs/objectives/agsm.md"]
ROWS = re.compile(r"(<!-- (?:table|endpoints)\s.*?-->\n).*?(?=<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure \S+ -->).*?(<!-- / -->)")
SWEEPS = sorted({file.name.removesuffix(".tar.xz") for file in STUDY.glob("*.tar.xz")} - {"negative_bank"})
NEWER = [("objectives", "agsm"), ("objectives", "ddpo"), ("objectives", "diffusion_nft"), ("sources", "pairs")]
NEWER += [("sources", "rollouts"), ("adapters", "lora"), ("adapters", "soft_tokens"), ("backbones", "stable_diffusion")]


@pytest.mark.parametrize("options_came_in", [False, True])
@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_that_continues_an_archive_finds_its_cells_done(name, options_came_in, tmp_path, monkeypatch):
    with tarfile.open(STUDY / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path / "docs" / "study", filter="data")
    for kind, part in NEWER if options_came_in else []:
        change_options(monkeypatch, kind, part, newer=0.0)
    monkeypatch.chdir(tmp_path)  # chains hang on the folder's name
    plan = make_plan(f"builtin:study/{name}", folder=Path("docs/study") / name)
    add_settings(plan.folder)
    done = [cell.name for cell in plan.cells if read_result(plan.run(cell.name), job_of(plan, cell))]
    assert len(done) == len(list(plan.folder.glob("cells/*/cell.json"))) > 3


def test_the_pages_figures_are_what_the_archives_cells_give(tmp_path):
    study = tmp_path / "docs" / "study"
    for name in PAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for file in STUDY.glob("*.tar.xz"):
        with tarfile.open(file) as archive:
            archive.extractall(study, filter="data")
    written = {name: (tmp_path / name).read_text(encoding="utf-8") for name in PAGES if name.endswith(".md")}
    for name, text in written.items():
        without = FIGURE.sub(r"\1gone\2", ROWS.sub(r"\1| gone |\n", text))
        assert without != text
        (tmp_path / name).write_text(without, encoding="utf-8")
    subprocess.run([sys.executable, str(study / "tables.py")], check=True)
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in written} == written


def test_tables_py_writes_every_figure_that_a_page_quotes():
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    quoted = {name: set(re.findall(r"<!-- figure (\S+) -->", text)) for name, text in texts.items()}
    assert [name for name, figures in quoted.items() if figures and name not in PAGES] == []
    assert set().union(*quoted.values()) == set(yaml.safe_load((STUDY / "figures.yaml").read_text(encoding="utf-8")))


def test_the_headers_of_recipes_leave_the_figures_to_the_page():
    results = [header_of(file).result for file in (shipped_recipes() | shipped_sweeps()).values()]
    of_the_study = [result for result in results if "docs/study/README.md" in result or " seeds" in result]
    assert len(of_the_study) > 10
    assert [result for result in of_the_study if re.search(r"\d\.\d", result)] == []


def test_a_figure_of_a_sweep_that_was_not_unpacked_is_named(tmp_path):
    (tmp_path / "docs" / "study").mkdir(parents=True)
    for name in ("tables.py", "figures.yaml", "README.md"):
        shutil.copy(STUDY / name, tmp_path / "docs" / "study")
    command = [sys.executable, str(tmp_path / "docs" / "study" / "tables.py"), "tokens"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "unpack its archive there" in result.stderr

"""The tables of docs/study/README.md are those of the archives beside it."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from newer_versions import change_options

from agsm_rl.sweep.first_version import add_settings
from agsm_rl.sweep.job import job_of, read_result
from agsm_rl.sweep.plan import make_plan

STUDY = Path(__file__).parents[2] / "docs" / "study"
SWEEPS = sorted({file.name.removesuffix(".tar.xz") for file in STUDY.glob("*.tar.xz")} - {"negative_bank"})
NEWER = [("objectives", "agsm"), ("objectives", "ddpo"), ("objectives", "diffusion_nft"), ("sources", "pairs")]
NEWER += [("sources", "rollouts"), ("adapters", "lora"), ("adapters", "soft_tokens"), ("backbones", "stable_diffusion")]
INTERVAL = re.compile(r" \[[^]|]*\]")
NUMBER = re.compile(r"[+−]?\d+\.\d+")


def numbers(page: str) -> list[float]:
    return [float(one.replace("−", "-")) for one in NUMBER.findall(page)]


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


def test_the_pages_tables_are_what_the_archives_cells_give(tmp_path):
    for name in ("README.md", "tables.py"):
        shutil.copy(STUDY / name, tmp_path)
    for file in STUDY.glob("*.tar.xz"):
        with tarfile.open(file) as archive:
            archive.extractall(tmp_path, filter="data")
    page = tmp_path / "README.md"
    written = page.read_text(encoding="utf-8")
    made = written.partition("<!-- table")[2]
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert len(rows) > 100
    without = written.replace("\n".join(rows[2:5]), "| gone |")
    assert without != written
    page.write_text(without, encoding="utf-8")
    subprocess.run([sys.executable, str(tmp_path / "tables.py")], check=True)
    found = page.read_text(encoding="utf-8")
    assert INTERVAL.sub("", found) == INTERVAL.sub("", written)
    # Another version of scipy may draw other resamples.
    assert numbers(found) == pytest.approx(numbers(written), abs=0.3)

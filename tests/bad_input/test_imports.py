"""What a stranger's folder and files name is not imported: modules beside a recipe, and those that weights ask for."""

import os
import subprocess
import sys
from pathlib import Path

from agsm_rl.sweep.executors import run_job

NAMES = ("typing", "typer", "yaml", "platform", "random", "torch", "megatron", "optree", "kernels")


def folder_of_impostors(folder: Path) -> Path:
    """Modules called as others are; the file `it-ran` appears when one of them is imported."""
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'it-ran')!r}, 'a').write('{name} ')\n")
    return folder


def run_here(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_python_m_imports_nothing_from_the_current_folder(tmp_path):
    done = run_here(folder_of_impostors(tmp_path), "-m", "agsm_rl", "convert", "missing", "out.safetensors")
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "it-ran").exists(), (tmp_path / "it-ran").read_text()


def test_a_sweep_s_cell_imports_nothing_from_the_current_folder(tmp_path):
    run_job(tmp_path / "job.json", tmp_path / "log", threads=1, cwd=str(folder_of_impostors(tmp_path)))
    assert "job.json" in (tmp_path / "log").read_text()
    assert not (tmp_path / "it-ran").exists(), (tmp_path / "it-ran").read_text()


def test_an_allowed_module_of_the_current_folder_is_still_found(tmp_path):
    (tmp_path / "mine.py").write_text("print('imported')\n")
    done = run_here(tmp_path, "-m", "agsm_rl", "serve-reward", "mine:Reward", "--allow-import", "mine")
    assert "imported" in done.stdout and "has no 'Reward'" in done.stderr

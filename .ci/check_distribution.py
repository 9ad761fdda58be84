"""Build the wheel and the sdist, check what is in them, and use each from an empty environment.

    python .ci/check_distribution.py          # needs `build`; `tox -e dist` runs it

Everything happens in a temporary folder with no checkout beside it, so that what works here works for somebody who has
only the installed package. The environment is made once: pip replaces the wheel's installation by the sdist's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"agsm_rl": "agsm_rl", "rewards": "agsm_rl_rewards", "recipes": "agsm_rl_recipes"}
"""The repository's folder → the package that it is installed as."""
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
"""What an sdist has besides the packages."""
TRAIN = ["train", "builtin:agsm", "--run-dir", "run", "--set", "steps=3", "--set", "evaluate.num_images=2"]
TRAIN += ["--set", "evaluate.num_steps=2", "--set", "sample.num_images=2", "--set", "sample.num_steps=2"]


def main() -> None:
    """Build, look inside, install and run; the first thing that is wrong ends it."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tracked = copy_tracked_files(work / "source")
        run(sys.executable, "-m", "build", "--outdir", work / "dist", work / "source", cwd=work)
        [wheel], [sdist] = (list((work / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
        check_wheel(wheel, tracked)
        check_sdist(sdist, tracked)
        shutil.copy(ROOT / "constraints.txt", work)
        shutil.rmtree(work / "source")
        venv.create(work / "venv", with_pip=True)
        for built in (wheel, sdist):
            install(work, built)
            use(work, built)


def run(*command: object, cwd: Path) -> str:
    """Run a command outside the checkout and return its output; a failure shows it and ends the check."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def copy_tracked_files(target: Path) -> set[str]:
    """Copy what git tracks, so that nothing left in the checkout (build/, *.egg-info) can get into the packages."""
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    tracked = [name for name in tracked if name.split("/")[0] in PACKAGES.keys() | BESIDE]
    for name in tracked:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return set(tracked)


def check_wheel(wheel: Path, tracked: set[str]) -> None:
    """Each tracked file of the packages is in the wheel, and nothing else but its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for name in tracked - BESIDE:
        folder, _, rest = name.partition("/")
        expected.add(f"{PACKAGES[folder]}/{rest}")
    compare(wheel, names, expected)


def check_sdist(sdist: Path, tracked: set[str]) -> None:
    """The sdist has the same, and what builds and describes the package."""
    with tarfile.open(sdist) as archive:
        files = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    generated = {"PKG-INFO", "setup.cfg"}
    names = {name for name in files if name not in generated and ".egg-info/" not in name}
    compare(sdist, names, tracked)


def compare(built: Path, names: set[str], expected: set[str]) -> None:
    """End the check when files are missing, or there are some that do not belong in it."""
    if names != expected:
        missing, unneeded = sorted(expected - names), sorted(names - expected)
        sys.exit(f"{built.name}: missing: {missing}; not needed: {unneeded}. See MANIFEST.in, setup.py, package-data.")
    print(f"{built.name}: {len(names)} files, {built.stat().st_size / 1e6:.1f} MB", flush=True)


def install(work: Path, built: Path) -> None:
    """Install a built package with the tested versions of what it needs, in place of the one that is there."""
    pip = [work / "venv/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "uninstall", "--yes", "agsm-rl", cwd=work)
    run(*pip, "install", "--no-compile", "--constraint", work / "constraints.txt", built, cwd=work)


def use(work: Path, built: Path) -> None:
    """List, and train three steps, from the installed package alone."""
    place = work / f"use-{built.suffix[1:]}"
    place.mkdir()
    python, command = work / "venv/bin/python", work / "venv/bin/agsm-rl"
    script = (
        "import agsm_rl, importlib.metadata as m; print(agsm_rl.__file__, agsm_rl.__version__, m.version('agsm-rl'))"
    )
    file, version, of_metadata = run(python, "-c", script, cwd=place).split()
    if not Path(file).is_relative_to(work / "venv") or version != of_metadata:
        sys.exit(f"{built.name}: {file} was imported, version {version}; the metadata's version is {of_metadata}.")
    run(command, "list", cwd=place)
    run(command, *TRAIN, cwd=place)
    for name in ("metrics.jsonl", "eval.json", "adapter", "report.html"):
        if not (place / "run" / name).exists():
            sys.exit(f"{built.name}: the run has no {name}.")
    print(f"{built.name}: installed, listed and trained", flush=True)


if __name__ == "__main__":
    main()

"""The figures of docs/study/README.md are those of the archives beside it."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[1] / "docs" / "study"
INTERVAL = re.compile(r" \[[^]|]*\]")
"""Resamples may fall otherwise with another version of scipy: values alone are compared."""


@pytest.mark.parametrize("sweep", ["tokens", "over_optimisation"])
def test_the_pages_tables_are_what_the_archives_cells_give(tmp_path, sweep):
    for name in ("README.md", "tables.py"):
        shutil.copy(STUDY / name, tmp_path)
    with tarfile.open(STUDY / f"{sweep}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    page = tmp_path / "README.md"
    written = page.read_text(encoding="utf-8")
    start = written.index(f"sweep: {sweep}")
    rows = [line for line in written[start : written.index("<!-- end -->", start)].splitlines() if line[:1] == "|"]
    assert len(rows) > 4
    # What is written anew: without its figures the page gets them back.
    page.write_text(written.replace("\n".join(rows[2:5]), "| gone |"), encoding="utf-8")
    subprocess.run([sys.executable, str(tmp_path / "tables.py"), sweep], check=True)
    found = page.read_text(encoding="utf-8")
    assert INTERVAL.sub("", found) == INTERVAL.sub("", written) and found.count("[") == written.count("[")

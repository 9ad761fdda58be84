"""The file that the command writes: whole, repeatable, and text is only text in it."""

import hashlib
import re
from importlib.resources import files

import pytest
from making_runs import write_run, write_sweep
from reading_pages import HOSTILE, hostile_sweep, page
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.report.page import write_report


def test_the_command_writes_the_report_beside_a_run_or_here_or_where_it_is_told(tmp_path, sweep, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "mine")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0 and (run / "report.html").is_file()
    other = write_run(tmp_path / "other", rank=4)
    done = CliRunner().invoke(app, ["report", str(run), str(other)])
    assert done.exit_code == 0 and done.output.strip() == "report.html" and (tmp_path / "report.html").is_file()
    done = CliRunner().invoke(app, ["report", str(run), str(other), "-o", str(tmp_path / "a.html")])
    assert done.exit_code == 0 and done.output.strip() == str(tmp_path / "a.html")
    assert CliRunner().invoke(app, ["report", str(sweep), "-o", str(tmp_path / "b.html")]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{run}"], "the same run twice"),
        (["{run}", "-o", "{run}"], "give a file"),
        (["{run}", "-o", "{run}/no/a.html"], "there is no folder"),
        (["{run}/samples"], "is neither a run folder"),
    ],
)
def test_a_wrong_command_is_one_message_and_exit_code_2(arguments, message, tmp_path):
    run = write_run(tmp_path / "mine")
    done = CliRunner().invoke(app, ["report", *(one.format(run=run) for one in arguments)])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_the_same_runs_give_the_same_file(tmp_path, sweep):
    for name in ("a.html", "b.html"):
        write_report([sweep], tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_page_refers_to_nothing_outside_and_runs_only_its_own_scripts(sweep):
    found = page(sweep)
    assert all(reference.startswith(("#", "data:")) for reference in found.references)
    scripts = [content for attributes, content in found.scripts if attributes.get("type") != "application/json"]
    assert len(scripts) == 3 and "default-src 'none'" in found.policy
    import base64

    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in found.policy


def test_names_and_prompts_are_text_and_never_markup(tmp_path):
    folder = hostile_sweep(tmp_path)
    found = page(folder)
    assert len(found.scripts) == 4 and len(found.references) == len(page_of_plain_names(tmp_path).references)
    assert found.suite["pictures"]["prompts"][0]["prompt"] == f"{HOSTILE} 0"
    assert found.data["variants"][0]["name"] == HOSTILE
    assert HOSTILE in found.text


def page_of_plain_names(tmp_path):
    return page(write_sweep(tmp_path / "plain", {"one": {}}, [0, 1], {"one-seed1": "failed"}))


PUBLISHED = {
    "d3.min.js": ("7.9.2", "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1"),
    "plot.umd.min.js": ("0.6.17", "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_embedded_libraries_are_the_published_files_with_their_licence(name):
    version, digest = PUBLISHED[name]
    assets = files("agsm_rl.report") / "assets"
    assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == digest
    licences = (assets / "LICENSES.txt").read_text()
    assert (
        re.search(rf"{version} \({re.escape(name)}\)", licences)
        and "permission notice appear in all copies" in licences
    )

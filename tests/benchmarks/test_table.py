"""README.md's tables are made of the recorded results."""

import json
import time
from pathlib import Path

import table

COMPARISON = {"ratio": 1.5, "low": 1.4, "high": 1.6, "ours": 0.1, "other": 0.15, "unit": "s"}


def line_of(tables: str, words: str) -> list[str]:
    """The cells of the line that begins so."""
    (line,) = (line for line in tables.splitlines() if line.startswith(f"| {words}"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_result_fills_its_line(tmp_path):
    result = {"machine": "two cores", "comparisons": {"step": COMPARISON}}
    (tmp_path / "ddpo_step_embedded_cpu.json").write_text(json.dumps(result))
    cells = line_of(table.make_tables(tmp_path), "DDPO, embedded base, CPU")
    assert cells[1:] == ["≥ 1.5", "1.5 [1.4, 1.6]", "0.1 s", "0.15 s", "two cores"]


def test_a_measurement_still_to_come_has_empty_cells(tmp_path):
    tables = table.make_tables(tmp_path)
    assert line_of(tables, "AGSM step, SD1.5's size, 512 px")[1:] == ["≥ 2", "", "", "", ""]
    assert line_of(tables, "sd3, cuda")[1:] == [""] * 7


def test_amounts_are_written_in_their_units(tmp_path):
    memory = {"ratio": 0.5, "ours": 2**30, "other": 2**31, "unit": "bytes"}
    result = {"machine": "a GPU", "comparisons": {"step": COMPARISON, "memory": memory}}
    (tmp_path / "agsm_step_embedded_cpu.json").write_text(json.dumps(result))
    (tmp_path / "agsm_step_sd15_cpu.json").write_text(json.dumps(result))
    lines = [line for line in table.make_tables(tmp_path).splitlines() if "peak memory: share of the published" in line]
    assert "0.5 | 1.00 GiB | 2.00 GiB | a GPU" in lines[0]


def test_a_goal_is_reached_on_the_side_that_its_sign_says(tmp_path):
    for name, seconds in {"main job": 400.0, "check": 2.9}.items():
        figures = {name: {"unit": "s", "ours": seconds}}
        (tmp_path / f"{name.replace(' ', '_')}_cpu.json").write_text(json.dumps({"comparisons": figures}))
    (tmp_path / "agsm_step_embedded_cpu.json").write_text(json.dumps({"comparisons": {"step": COMPARISON}}))
    step, job, check = table.goals(tmp_path)
    assert table.goals(tmp_path, since=time.time() + 60) == []
    assert step.startswith("reached") and check.startswith("reached") and job.startswith("NOT reached")


def test_an_amount_without_another_side_leaves_the_cells_of_the_ratio_and_the_other_empty(tmp_path):
    figures = {"main job": {"unit": "s", "ours": 321.0}}
    (tmp_path / "main_job_cpu.json").write_text(json.dumps({"machine": "two cores", "comparisons": figures}))
    assert line_of(table.make_tables(tmp_path), "The main job")[2:] == ["", "321 s", "", "two cores"]


def test_one_result_is_said_in_a_line_for_each_of_its_figures(tmp_path):
    steps = {"agsm": {"seconds": 0.5, "peak_gib": 20.0, "predicted/allocated": 0.95}}
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"machine": "a GPU", "comparisons": {"step": COMPARISON}, "steps": steps}))
    assert table.say(file).splitlines() == [
        "  result",
        "    step: 1.5 [1.4, 1.6] (0.1 s, other 0.15 s)",
        "    agsm: 0.5 s, 20 GiB; predicted/allocated: 0.95",
    ]


def test_the_memory_predicted_for_a_step_stands_beside_what_it_took(tmp_path):
    step = {"seconds": 0.5, "peak_gib": 20.0, "predicted_gib": 19.0, "predicted/allocated": 0.95}
    result = {"what": "FLUX", "machine": "a GPU", "steps": {"agsm": step}}
    (tmp_path / "full_size_flux_2_cuda.json").write_text(json.dumps(result))
    assert line_of(table.make_tables(tmp_path), "flux_2, cuda")[1:6] == ["agsm", "0.5", "20", "19", "0.95"]


def test_the_readme_has_the_tables_of_the_recorded_results():
    text = (Path(table.HERE) / "README.md").read_text()
    assert text == table.put_in(text, table.make_tables(table.HERE / "results")), "run python benchmarks/table.py"

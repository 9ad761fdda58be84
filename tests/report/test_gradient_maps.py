"""Gradient maps in a report: means over looks, what is advised, and what is refused."""

import json

import pytest
from making_runs import write_run

from agsm_rl.errors import UserError
from agsm_rl.report.gradient_maps import Cell, gradient_maps
from agsm_rl.report.page import write_report
from agsm_rl.report.runs import read_runs


def with_looks(run, *tables, edges=(0.0, 0.5, 1.0)):
    blocks = ["lora: down_blocks.0", "tokens: soft_tokens"]
    lines = [
        {"step": 5 * (number + 1), "edges": list(edges), "blocks": blocks, "cosines": {"agsm/ddpo": table}}
        for number, table in enumerate(tables)
    ]
    (run / "gradient_map.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def only(run):
    (found,) = gradient_maps(read_runs(run))
    return found


def test_cosines_are_means_over_the_looks_in_which_the_terms_met(tmp_path):
    run = with_looks(write_run(tmp_path / "mine"), [[0.2, None], [None, None]], [[0.6, 0.5], [None, -0.4]])
    found = only(run)
    assert found.looks == 2 and found.levels == ["0 to 0.5", "0.5 to 1"]
    assert [(block, [str(cell) for cell in cells]) for block, cells in found.rows] == [
        ("lora: down_blocks.0", ["+0.40", "–"]),
        ("tokens: soft_tokens", ["+0.50", "−0.40"]),
    ]
    write_report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "mine: agsm and ddpo, by block and noise level" in text and '<td class="shade-2">−0.40</td>' in text


@pytest.mark.parametrize(
    ("table", "advice"),
    [
        ([[0.0, 0.2], [-0.3, -0.2]], "fight at noise levels 0.5 to 1 alone: keep one of them out by `t:"),
        ([[-0.5, -0.2], [-0.3, -0.2]], "fight at every noise level: train separate adapters"),
        ([[0.3, 0.2], [0.05, -0.05]], None),
    ],
)
def test_advice_follows_where_the_terms_fight(tmp_path, table, advice):
    found = only(with_looks(write_run(tmp_path / "mine"), table)).advice
    assert (advice is None and found == []) or advice in found[0]


def test_gradients_of_very_different_length_are_reported(tmp_path):
    run = with_looks(write_run(tmp_path / "mine"), [[0.3, 0.2], [0.3, 0.2]])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"agsm/grad_norm": 0.01, "ddpo/grad_norm": 2.0} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "The gradient of ddpo is 200 times as long as that of agsm" in only(run).advice[0]


@pytest.mark.parametrize("table", [[[0.1, 0.2]], [[0.1], [0.2]], [[2.0, 0.1], [0.1, 0.1]], "x", [["a", 0.1], [0, 0]]])
def test_a_damaged_map_is_refused_by_name(tmp_path, table):
    run = with_looks(write_run(tmp_path / "mine"), table)
    with pytest.raises(UserError, match=r"gradient_map\.jsonl: a line is not a look at gradients"):
        only(run)


def test_shades_have_the_sign_and_grow_with_the_cosine():
    assert [Cell(value).shade for value in (None, 0.05, 0.2, 0.3, 0.9, -0.2, -0.9)] == [0, 0, 1, 2, 3, -1, -3]

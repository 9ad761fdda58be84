"""A study's primary endpoints: read strictly, estimated as the report does, adjusted for their number."""

import json
import re
import shutil

import pytest
from making_runs import write_run
from reading_pages import page
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.report.endpoints import answers, holm, p_text
from agsm_rl.report.load import load

STUDY = """
endpoints:
  - {question: "Does strong beat the base?", variant: strong}
  - {question: "Does strong beat weak?", variant: strong, minus: weak, guidance: 2, score: correct}
  - {question: "And in one tag?", variant: strong, minus: weak, guidance: 1, tag: counting}
"""


def mirrored(change: dict) -> dict:
    tags = {name: [-part[0], -part[2], -part[1]] for name, part in change["tags"].items()}
    value, low, high = change["overall"]
    return {"overall": [-value, -high, -low], "tags": tags}


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "primary.yaml"
    file.write_text(STUDY)
    return file


def test_holm_multiplies_the_smallest_by_their_number_and_keeps_the_order():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert [p_text(p) for p in (0.0004, 0.0123, 0.3)] == ["< 0.001", "0.012", "0.30"]


def test_each_answer_is_the_reports_own_difference(sweep, study):
    found = answers(study, load([sweep]))
    keys = [("strict", "strong", "base", 1), ("correct", "strong", "weak", 2), ("strict", "strong", "weak", 1)]
    names = ("score", "model", "minus", "guidance")
    shown = {tuple(one[name] for name in names): one for one in page(sweep).suite["differences"]}
    reverse = {(score, other, one, at): change for (score, one, other, at), change in shown.items()}
    first, second, third = (shown.get(key) or mirrored(reverse[key]) for key in keys)
    wanted = [first["overall"], second["overall"], third["tags"]["counting"]]
    changes = [[one.change.value, one.change.low, one.change.high] for one in found]
    assert changes == [pytest.approx(one, abs=2e-6) for one in wanted]
    assert [one.seeds for one in found] == [2, 2, 2]
    assert [one.holm for one in found] == pytest.approx(holm([one.change.p_value for one in found]))
    assert all(one.verdict == "not told apart" for one in found if one.holm >= 0.05)


@pytest.mark.parametrize("split", ["held_out", "validation"])
def test_an_answer_from_validation_prompts_says_so(split, tmp_path, study):
    for seed in (0, 1):
        file = write_run(tmp_path / f"strong-seed{seed}", seed=seed) / "eval.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"split": split}))
    study.write_text('endpoints: [{question: "Is it better?", variant: strong}]')
    (found,) = answers(study, load([tmp_path / f"strong-seed{seed}" for seed in (0, 1)]))
    assert found.what.endswith(", on validation prompts") == (split == "validation")


def test_a_question_without_an_endpoint_is_corrected_for_all_the_same(sweep, study):
    asked = [one.holm for one in answers(study, load([sweep]))]
    study.write_text(STUDY + "questions: 5\n")
    with_two_more = answers(study, load([sweep]))
    p_values = [one.change.p_value for one in with_two_more]
    assert [one.holm for one in with_two_more] == pytest.approx(holm([*p_values, 1.0, 1.0])[:3])
    smallest = p_values.index(min(p_values))
    assert with_two_more[smallest].holm > asked[smallest]


def test_fewer_seeds_than_an_endpoint_wants_are_refused(sweep, study):
    study.write_text(STUDY.replace("variant: strong}", "variant: strong, seeds: 2}"))
    assert answers(study, load([sweep]))[0].seeds == 2
    study.write_text(STUDY.replace("variant: strong}", "variant: strong, seeds: 5}"))
    with pytest.raises(UserError, match=r"endpoints\[0\].seeds: wants 5; 2 are there for both"):
        answers(study, load([sweep]))


def test_a_sweep_beside_the_file_is_read_where_it_is_named(sweep, tmp_path):
    shutil.copytree(sweep, tmp_path / "study")
    for seed in (0, 1):
        for name in ("weak", "strong"):
            (tmp_path / "study" / "cells" / f"{name}-seed{seed}" / "cell.json").write_text("{}")
    file = tmp_path / "primary.yaml"
    file.write_text("endpoints: [{question: 'Better?', variant: strong, minus: weak, sweep: study}]")
    (apart,) = answers(file)
    file.write_text("endpoints: [{question: 'Better?', variant: strong, minus: weak}]")
    (within,) = answers(file, load([sweep]))
    assert apart.change == within.change
    with pytest.raises(UserError, match="names no sweep"):
        answers(file)


def test_the_command_writes_a_row_for_each_question(sweep, study, tmp_path):
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(sweep), "-o", str(out), "--primary", str(study)])
    assert result.exit_code == 0, result.output
    text = out.read_text()
    assert "Primary endpoints" in text and "Does strong beat weak?" in text
    assert "strong minus weak, counting, guidance 1" in text
    headline = re.search("<h1>(.*?)</h1>", text)[1]
    told = [answer for answer in answers(study, load([sweep])) if answer.told_apart]
    assert headline.startswith(
        f"Of {len(answers(study, load([sweep])))} questions that were named, {len(told) or 'none'}"
    )
    assert all(answer.figures[0] in headline for answer in told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("endpoints: []", "is empty"),
        ("endpoints: [{question: A, variant: string}]", "'string' is not a variant here"),
        ("endpoints: [{question: A, variant: strong, tag: color}]", "got 'color'; there are"),
        ("endpoints: [{question: A, variant: strong, guidance: 7}]", "got '7'; there are 1, 2"),
        ("endpoints: [{question: A, variants: strong}]", "variants"),
        ("endpoints: [{question: A, variant: '', sweep: study}]", "is empty, which is the base"),
        ("{questions: 0, endpoints: [{question: A, variant: strong}]}", "questions: got 0, but there are 1 endpoints"),
    ],
)
def test_a_mistake_in_the_file_is_named(sweep, study, text, message):
    study.write_text(text)
    with pytest.raises(UserError, match=message):
        answers(study, load([sweep]))


def test_seeds_of_two_digits_are_one_variant(tmp_path):
    for seed in (2, 10):
        write_run(tmp_path / "study" / "cells" / f"strong-seed{seed}", seed=seed)
        (tmp_path / "study" / "cells" / f"strong-seed{seed}" / "cell.json").write_text("{}")
    file = tmp_path / "primary.yaml"
    file.write_text("endpoints: [{question: 'Better?', variant: strong, sweep: study}]")
    assert answers(file)[0].seeds == 2


def test_a_bare_variant_beside_one_of_another_sweep_needs_its_sweep(sweep, study):
    study.write_text("endpoints: [{question: A, variant: strong, minus: other/weak}]")
    with pytest.raises(UserError, match="names no sweep for strong"):
        answers(study, load([sweep]))


def test_variants_without_a_common_seed_are_refused(tmp_path, study):
    runs = [write_run(tmp_path / "strong-seed0", seed=0), write_run(tmp_path / "weak-seed1", seed=1, rank=4)]
    study.write_text("endpoints: [{question: A, variant: strong, minus: weak}]")
    with pytest.raises(UserError, match="no seed in common"):
        answers(study, load(runs))

"""The suite `questions`: a real server on this machine, by the command line and in a run, and figures by hand."""

import json
import math

import numpy as np
import pytest
from agsm_rl_rewards.question_list import Question
from chat_serving import likely, serving
from PIL import Image
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.intervals import ratio_over_prompts
from agsm_rl.evaluate.suites.questions import Questions
from agsm_rl.evaluate.suites.questions_result import Answers, QuestionsResult

LIKELY = {"red": 0.9, "three": 0.4, "left": 0.2}


@pytest.fixture
def endpoint():
    """Finds an answer as probable as the word in its question says."""
    with serving() as server:
        server.reply = lambda body: (200, answer(body["messages"][0]["content"][1]["text"]))
        yield server


def answer(question):
    (probability,) = [value for word, value in LIKELY.items() if word in question]
    return likely(**{"three" if "How many" in question else "Yes": probability, "other": 0.05})


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)])


GENEVAL2 = [
    {"prompt": "three red cups", "atom_count": 2, "skills": ["attribute", "count"]}
    | {"vqa_list": [["Are the cups red?", "Yes"], ["How many of three cups?", "three"]]},
    {"prompt": "a red cup left of a dog", "atom_count": 3, "skills": ["attribute", "position"]}
    | {"vqa_list": [["Is the cup red?", "Yes"], ["Is the cup left of the dog?", "Yes"]]},
]
ASKED = ("--suite", "questions", "--option", "form=geneval2", "--option", "model=tiny-vlm")


def test_a_base_is_measured_on_geneval_2_s_file_as_its_authors_do(command, endpoint, tmp_path, tiny_checkpoint):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, GENEVAL2)))
    more = ("--prompts", "data.jsonl", "--num-steps", 2, "--option", f"url={endpoint.url}", "--json", "e.json")
    result = command(tiny_checkpoint, *ASKED, *more)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "e.json").read_text())
    scores = [math.sqrt(0.9 * 0.4), math.sqrt(0.9 * 0.2)]
    assert (content["suite"], content["num_images"], content["aggregate"]) == ("questions", 2, "geometric")
    assert content["overall"] == pytest.approx(np.mean(scores))
    assert content["aggregates"]["mean"]["score"] == pytest.approx((0.65 + 0.55) / 2)
    assert {tag: (row["total"], round(row["score"], 6)) for tag, row in content["tags"].items()} == {
        "attribute": (2, 0.9),
        "count": (1, 0.4),
        "position": (1, 0.2),
    }
    atoms = content["by_prompts"]["atom_count"]
    assert [atoms[number]["score"] for number in ("2", "3")] == pytest.approx(scores)
    assert [row["scores"]["overall"] for row in content["images"]] == pytest.approx(scores)
    assert content["images"][0]["answers"][1]["answer"] == "three"
    assert "images (geometric mean)" in result.output


def folder_of(path, rows):
    for index, row in enumerate(rows):
        samples = path / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(row))
        Image.new("RGB", (8, 8)).save(samples / "0000.png")


def test_images_of_any_tool_are_asked_about_once(command, endpoint, tmp_path):
    folder_of(tmp_path / "ours", [{"prompt": "a cup", "questions": ["Is it red?", "Is it left?"]}])
    arguments = ("ours", "--suite", "questions", "--option", "model=m", "--option", f"url={endpoint.url}")
    assert command(*arguments, "--json", "a.json").exit_code == 0
    assert command(*arguments, "--json", "b.json").exit_code == 0
    assert json.loads((tmp_path / "a.json").read_text())["overall"] == pytest.approx(0.55)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert len(endpoint.asked) == 2


def test_questions_that_were_edited_are_asked(command, endpoint, tmp_path):
    folder_of(tmp_path / "ours", [{"prompt": "a cup", "questions": ["Is it red?", "Is it left?"]}])
    arguments = ("ours", "--suite", "questions", "--option", "model=m", "--option", f"url={endpoint.url}")
    assert command(*arguments, "--json", "e.json").exit_code == 0
    row = {"prompt": "a cup", "questions": ["Is it left?"]}
    (tmp_path / "ours/00000/metadata.jsonl").write_text(json.dumps(row))
    assert command(*arguments, "--json", "e.json").exit_code == 0
    assert json.loads((tmp_path / "e.json").read_text())["overall"] == pytest.approx(0.2)
    assert len(endpoint.asked) == 3


def test_another_machine_needs_leave(command, tmp_path):
    folder_of(tmp_path / "ours", [{"prompt": "a cup", "questions": ["Is it red?"]}])
    result = command("ours", "--suite", "questions", "--option", "model=m", "--option", "url=https://judge.example/v1")
    assert result.exit_code == 2 and "--allow-host judge.example" in result.output


@pytest.mark.parametrize(
    ("row", "message"),
    [({"prompt": "a cup"}, "it has no questions"), ({"prompt": "a cup", "questions": [1]}, "question 0: it is 1")],
)
def test_prompts_without_questions_are_refused_before_anything_is_drawn(command, tmp_path, row, message):
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    options = ("--suite", "questions", "--prompts", "data.jsonl", "--option", "model=m")
    result = command("no-such-model", *options)
    assert result.exit_code == 2 and "the prompt 'a cup'" in " ".join(result.output.split())
    assert message in " ".join(result.output.split())


def test_wrong_options_are_refused():
    with pytest.raises(UserError, match="form: 'geneval3' is not a form of questions"):
        Questions(model="m", prompts="x.jsonl", form="geneval3")
    with pytest.raises(UserError, match="form: a geneval2 file has its own columns"):
        Questions(model="m", prompts="x.jsonl", form="geneval2", prompt_column="text")
    with pytest.raises(UserError, match="suite questions: no prompts"):
        Questions(model="m").prompts()


def rows(*answers, questions=None):
    questions = questions or [Question("a", category="entity - whole"), Question("b", category="attribute - color")]
    return tuple(
        Answers(index, number, f"prompt {index}", {}, questions, scores)
        for index, images in enumerate(answers)
        for number, scores in enumerate(images)
    )


def test_a_category_is_the_mean_of_its_answers_and_an_image_counts_only_what_holds():
    questions = [Question("a", category="entity - whole"), Question("b", category="entity - part", requires=(0,))]
    result = QuestionsResult(rows([[0.0, 1.0]], [[1.0, 1.0]], questions=questions), "mean")
    content = result.to_json()
    assert content["overall"] == 0.5
    assert content["tags"]["entity - part"]["score"] == 1.0
    assert content["groups"]["entity"]["score"] == 0.75


def test_a_prompts_images_count_once_together():
    result = QuestionsResult(rows([[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0]]), "mean")
    assert result.overall().value == 0.75
    assert result.per_image() == {"overall": [1.0, 0.0, 1.0]}
    assert result.by_category()["entity - whole"].value == pytest.approx(2 / 3)


def test_two_targets_are_paired_and_others_are_refused():
    ours = QuestionsResult(rows([[1.0, 0.5]], [[0.5, 0.5]], [[0.75, 1.0]]), "mean")
    theirs = QuestionsResult(rows([[0.5, 0.5]], [[0.5, 0.0]], [[0.75, 0.5]]), "mean")
    difference = ours.against(theirs)["difference"]
    assert difference["overall"]["value"] == pytest.approx(0.25)
    assert difference["tags"]["entity - whole"]["value"] == pytest.approx(0.5 / 3)
    assert difference["tags"]["attribute - color"]["value"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="cannot be paired"):
        ours.against(QuestionsResult(theirs.rows[:2], "mean"))


def test_a_ratios_interval_is_over_prompts():
    random = np.random.default_rng(0)
    counts = random.integers(1, 6, 200)
    sums = np.array([random.binomial(count, 0.3) for count in counts], dtype=float)
    part = ratio_over_prompts(sums, counts)
    assert part.value == pytest.approx(sums.sum() / counts.sum())
    spread = math.sqrt(0.3 * 0.7 / counts.sum())
    assert part.high - part.low == pytest.approx(2 * 1.96 * spread, rel=0.25)
    assert math.isnan(ratio_over_prompts(np.array([1.0]), np.array([2])).low)
    assert ratio_over_prompts(np.array([1.0, 0.0]), np.array([1, 0])).value == 1

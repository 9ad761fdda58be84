"""Runs that are measured on their user's own prompts and rewards: rules, records, pictures, and shares of processes."""

import json
import shutil
import sys
from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings
from agsm_rl.evaluate.image_folder import open_picture
from agsm_rl.evaluate.measure import draw_and_judge
from agsm_rl.evaluate.measured import Entry
from agsm_rl.evaluate.suites.rewards import Rewards
from agsm_rl.export.attach import read_export
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.reward_specs import RewardSpec
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.recipe.suites import MadeSuite
from agsm_rl.report.load import load
from agsm_rl.report.pictures import pictures
from agsm_rl.run.lifecycle import train

TASTE = """
class Taste:
    name, differentiable, takes_metadata = "taste", False, True

    def __init__(self, *, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, images, prompts, metadata=None):
        likes = [row["likes"] for row in metadata]
        return self.factor * images.mean((2, 3))[range(len(likes)), ["rgb".index(like) for like in likes]]
"""
PROMPTS = [("a cat", "r"), ("a dog on a hill", "g"), ("two birds", "b")]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A prompt file and a reward of the user's, in the working folder."""
    (tmp_path / "own_taste.py").write_text(TASTE)
    rows = [json.dumps({"prompt": prompt, "likes": likes}) for prompt, likes in PROMPTS]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_taste", None)


@pytest.fixture
def make_recipe(tiny_checkpoint, own):
    """Learns to draw dark pictures; measured on own prompts by a reward of the user's and a held-out one."""

    def make(**changes) -> Recipe:
        objective = {"use": "reward_backprop", "rewards": {"light": {"use": "brightness", "weight": -1.0}}}
        objective |= {"num_steps": 2, "guidance": 1.0}
        objective |= {"source": {"use": "prompts", "prompts": "mine.jsonl", "batch_size": 2}}
        rewards = {"taste": {"use": "own_taste:Taste", "factor": 2.0}, "sharpness": {}, "dark": {"use": "brightness"}}
        suites = {
            "mine": {"use": "rewards", "prompts": "mine.jsonl", "rewards": rewards},
            "toy": {"use": "shapes", "num_images": 4, "rewards": ["sharpness"], "final_only": True},
        }
        content = {
            "steps": 2,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": [objective],
            "optimizer": {"learning_rate": 0.03},
            "evaluate": {"every": 1, "suites": suites, "guidance": [1.0, 2.0], "num_steps": 2, "batch_size": 2},
            "checkpoint": {"every": 1, "keep": 1, "best": "mine/sharpness"},
            "sample": {"prompts": ["a red star"], "num_images": 1, "num_steps": 2},
            "track": [],
        }
        return Recipe.from_data(content | changes, allow_imports=["own_taste"])

    return make


def test_a_run_is_measured_on_own_prompts_by_own_rewards_and_keeps_the_best_by_a_suite_s_score(make_recipe, own):
    recipe = make_recipe()
    assert Recipe.from_data(recipe.to_data(), allow_imports=["own_taste"]) == recipe
    screen = StringIO()
    folder = train(recipe, own / "run", console=Console(file=screen, width=300))
    content = json.loads((folder / "eval.json").read_text())
    assert content["suite"] == "rewards" and content["num_images"] == 3
    assert [row["prompt"] for row in content["images"]] == [prompt for prompt, _ in PROMPTS]
    assert content["reward_roles"] == {
        "mine/taste": "held_out",
        "mine/sharpness": "held_out",
        "mine/dark": "trained",
        "toy/sharpness": "held_out",
    }
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    places = [(row["step"], row["suite"], row["guidance"]) for row in lines]
    mine = [(step, "mine", guidance) for step in (1, 2) for guidance in (1.0, 2.0)]
    assert places == [*mine, (2, "toy", 1.0), (2, "toy", 2.0)]
    sharp = {row["step"]: row["reward/sharpness"] for row in lines if row["guidance"] == 1.0 and row["suite"] == "mine"}
    best = max(sharp, key=sharp.get)
    assert (content["best"]["by"], content["best"]["step"]) == ("mine/sharpness", best)
    assert content["best"]["base"] == content["base"]["tags"]["sharpness"]["score"]
    (file,) = (folder / "adapter-best").glob("*.safetensors")
    assert read_export(file)[1]["step"] == str(best)
    assert "mine" in content["suites"] and [use["use"] for use in content["suites"].values()] == ["rewards", "shapes"]
    toy = content["suites"]["toy"]["guidances"][0]
    assert toy["tags"] and toy["base"]["images"][0]["rewards"]["sharpness"] > 0
    assert set(toy["reward_changes"]["sharpness"]) == {"difference", "win_rate"}
    assert "reward/dark (trained)" in screen.getvalue() and "evaluation of mine after step 1" in screen.getvalue()


@pytest.fixture
def in_two_parts(make_recipe):
    """In its first step it learns from a reward, in its second from pairs."""
    first = make_recipe().to_data()["objectives"][0] | {"weight": {0: 1, 1: 0}}
    source = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2}
    second = {"use": "score_matching", "source": source, "weight": {0: 0, 1: 1}}
    return make_recipe(objectives=[first, second], checkpoint={"every": 1, "keep": 2})


def test_the_end_of_a_run_says_what_each_part_did_by_the_evaluations_at_its_ends(
    make_recipe, in_two_parts, own, capsys, monkeypatch
):
    monkeypatch.delenv("FORCE_COLOR", raising=False)  # with which lines are broken as on a terminal
    folder = train(in_two_parts, own / "run", console=Console(file=StringIO()))
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    sharp = [row["reward/sharpness"] for row in rows if row["guidance"] == 1.0 and row["suite"] == "mine"]
    base = json.loads((folder / "eval.json").read_text())["base"]["tags"]["sharpness"]["score"]
    first, second = (line for line in capsys.readouterr().out.splitlines() if "learned in steps" in line)
    assert first.startswith("reward_backprop learned in steps 1 to 1, with ")
    assert f"mine/reward/sharpness {base:.4g} -> {sharp[0]:.4g} (" in first
    assert second.startswith("score_matching learned in steps 2 to 2, with ")
    assert f"mine/reward/sharpness {sharp[0]:.4g} -> {sharp[1]:.4g} (" in second
    for line in (first, second):
        assert line.count(" -> ") == 3 == line.count("]") and "no interval" not in line
    recipe = make_recipe(start_from=str(folder), steps=1)
    train(recipe, own / "more", console=Console(file=StringIO()))
    assert "learned in steps" not in capsys.readouterr().out  # one term, without draws: nothing to tell apart


def test_a_resumed_run_says_the_same_of_its_parts_and_without_images_scores_no_interval(
    in_two_parts, own, capsys, monkeypatch
):
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def told() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if "learned in steps" in line]

    whole = train(in_two_parts, own / "whole", console=Console(file=StringIO()))
    expected, kept = told(), (whole / "image_scores.jsonl").read_text()
    assert [(row["step"], row["suite"]) for row in map(json.loads, kept.splitlines())] == [
        (1, "mine"),
        (2, "mine"),
        (2, "toy"),
    ]
    half = shutil.copytree(whole, own / "half")
    (half / "checkpoints" / "step-00000002.pt").unlink()
    train(in_two_parts, half, resume=True, console=Console(file=StringIO()))
    assert told() == expected and (half / "image_scores.jsonl").read_text() == kept
    # As an earlier version would have left it.
    (whole / "image_scores.jsonl").unlink()
    train(in_two_parts, whole, resume=True, console=Console(file=StringIO()))
    assert [line.partition(" (")[0] for line in told()] == [line.partition(" (")[0] for line in expected]
    assert not any("]" in line for line in told())


def test_the_pictures_of_a_suite_are_those_that_were_judged(make_recipe, own):
    folder = train(make_recipe(), own / "run", console=Console(file=StringIO()))
    content = json.loads((folder / "eval.json").read_text())
    for place, entry in (("", content), ("toy/", content["suites"]["toy"]["guidances"][0])):
        shown = sorted((folder / "samples" / "eval" / place / "guidance-1" / "trained").glob("*.png"))
        assert [int(path.stem) for path in shown] == list(range(len(entry["images"])))
    # And the report, which the run has made, shows them with every suite's scores.
    assert (folder / "report.html").is_file()
    loaded = load([folder])
    shown = {name: pictures(loaded.of(name)) for name in loaded.suites}
    assert {name: (one["kept"], one["total"]) for name, one in shown.items()} == {"mine": (3, 3), "toy": (4, 4)}
    scores = {name: loaded.of(name).evaluation.score_names for name in loaded.suites}
    assert scores == {"mine": ["taste", "sharpness", "dark"], "toy": ["strict", "correct", "sharpness"]}
    spec = RewardSpec("brightness", {}, 1.0, {}, key="dark", parts=Parts(where="test"))
    place = folder / "samples/eval/guidance-1/trained"
    opened = [open_picture(place / f"{row:04d}.png") for row in range(3)]
    rows = Rewards(rewards=[spec]).judge(opened, ["x"] * 3, [{"prompt": "x"}] * 3)
    measured = [row["scores"]["dark"][0] for row in content["images"]]
    assert [row["dark"] for row in rows] == pytest.approx(measured, abs=1e-6)


def test_an_interrupted_evaluation_of_several_suites_is_repeated_whole(make_recipe, own):
    whole = train(make_recipe(), own / "whole", console=Console(file=StringIO()))
    half = train(make_recipe(steps=1), own / "half", console=Console(file=StringIO()))
    assert len((half / "evaluations.jsonl").read_text().splitlines()) == 4  # the last evaluation has the toy too
    train(make_recipe(), half, resume=True, console=Console(file=StringIO()))
    lines = (whole / "evaluations.jsonl").read_text().splitlines()
    again = (half / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again if '"step": 2' in line] == [
        json.loads(line) for line in lines if '"step": 2' in line
    ]


def test_eval_measures_a_run_by_its_own_suite(make_recipe, own):
    folder = train(make_recipe(steps=1), own / "run", console=Console(file=StringIO()))
    options = ["--suite", "rewards", "--guidance", "1", "--num-steps", "2", "--batch-size", "2"]
    command = ["eval", str(folder), *options, "--allow-import", "own_taste", "--json", "e.json"]
    result = CliRunner().invoke(app, [*command, "--prompts", "mine.jsonl", "--compare"])
    assert result.exit_code == 0, result.output
    ours, theirs = json.loads((own / "e.json").read_text()), json.loads((folder / "eval.json").read_text())
    for mine, run in zip(ours["images"], theirs["images"], strict=True):
        assert mine["scores"]["sharpness"] == run["scores"]["sharpness"]
        assert mine["scores"]["own_taste:Taste:factor=2.0"] == run["scores"]["taste"]
    assert [row["scores"]["sharpness"] for row in ours["base"]["images"]] == [
        row["scores"]["sharpness"] for row in theirs["base"]["images"]
    ]


class Shares:
    """Processes one after the other: the first round is broken off at the exchange, the second gets what all gave."""

    def __init__(self, index, count, given):
        self.index, self.count, self.given = index, count, given

    def gather_objects(self, values):
        if len(self.given) < self.count:
            self.given[self.index] = values[0]
            raise RuntimeError("the others have not drawn yet")
        return [self.given[index] for index in range(self.count)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_any_number_of_processes_has_the_rows_and_pictures_of_one(backbone, own, count):
    parts = Parts(where="test", allow_imports=["own_taste"])
    specs = [RewardSpec(name, {}, 1.0, {}, key=name, parts=parts) for name in ("sharpness", "brightness")]
    suite = Rewards(rewards=specs, prompts="mine.jsonl", num_images=7)
    how = DrawingSettings(guidance=2.0, num_steps=2, batch_size=2)
    one = draw_and_judge(backbone, [suite], how)
    given = {}
    for index in range(count):
        with pytest.raises(RuntimeError, match="not drawn yet"):
            draw_and_judge(backbone, [suite], how, processes=Shares(index, count, given))
    for index in range(count):
        several = draw_and_judge(backbone, [suite], how, processes=Shares(index, count, given))
        assert several.judged == one.judged and several.pictures == one.pictures


def test_rewards_beside_a_suite_look_at_every_prompt_before_anything_is_drawn(backbone, own):
    class Picky:
        name, differentiable = "picky", False

        def check_prompts(self, prompts, metadata):
            for prompt, row in zip(prompts, metadata, strict=True):
                if row["likes"] == "b":
                    raise UserError(f"'{prompt}' likes blue")

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    sharpness = RewardSpec("sharpness", {}, 1.0, {}, parts=Parts(where="test"))
    beside = Rewards(rewards=[RewardSpec("picky", {}, 1.0, {})])
    beside.__dict__["_models"] = {"picky": Picky()}
    suite = Rewards(rewards=[sharpness], prompts="mine.jsonl")
    with pytest.raises(UserError, match="'two birds' likes blue"):
        Entry(MadeSuite("mine", suite, []), beside).prepare(backbone, Evaluate())


def test_what_stops_one_process_s_evaluation_stops_all(backbone, own):
    suite = Rewards(rewards=[RewardSpec("sharpness", {}, 1.0, {}, parts=Parts(where="test"))], prompts="mine.jsonl")
    how, given = DrawingSettings(guidance=1.0, num_steps=1), {0: (KeyError("a signal"), {}, {}), 1: (None, {}, {})}
    for index in (0, 1):
        with pytest.raises(KeyError, match="a signal"):
            draw_and_judge(backbone, [suite], how, processes=Shares(index, 2, given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": {"best": "mine/sharpnes"}}, "checkpoint.best: 'mine/sharpnes' is not.*mean 'mine/sharpness'"),
        ({"checkpoint": {"best": "sharpnes"}}, "checkpoint.best: 'sharpnes' is not.*mean 'mine/sharpness'"),
        ({"stop_when": {"toy/strict": {"falls_by": 0.1}}}, "'toy/strict' is of a suite with `final_only: true`"),
    ],
)
def test_a_score_that_is_not_measured_is_refused_with_the_nearest(make_recipe, changes, message):
    with pytest.raises(UserError, match=message):
        make_recipe(**changes)


def test_a_score_without_its_suite_is_the_first_suite_s(make_recipe):
    from agsm_rl.run.score_history import ScoreHistory

    history = ScoreHistory(make_recipe(checkpoint={"best": "sharpness"}, stop_when={"taste": {"falls_by": 1.0}}))
    assert (history.best_by, list(history.rules)) == ("mine/sharpness", ["mine/taste"])

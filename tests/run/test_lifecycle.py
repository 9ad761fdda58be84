"""Run folders: what a run leaves behind, how it is continued, and when it is refused."""

import hashlib
import json
import os
import shutil
import signal
from io import StringIO

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

from agsm_rl import __version__
from agsm_rl.cli.describe import describe
from agsm_rl.errors import UserError
from agsm_rl.evaluate import suite
from agsm_rl.export.attach import read_export
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.lifecycle import train
from agsm_rl.run.records import MetricsFile
from agsm_rl.run.stop import Stopped
from agsm_rl.trainer import Trainer


@pytest.fixture
def make_recipe(tiny_checkpoint):
    """AGSM over LoRA on the tiny base."""

    def make(**changes) -> Recipe:
        pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 16}
        content = {
            "steps": 4,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2, "banks": 2}},
            "objectives": [{"use": "agsm", "source": pairs}],
            "checkpoint": {"every": 2},
            "sample": {"every": 2, "num_images": 2, "num_steps": 2, "prompts": ["a red star"]},
            "track": [],
        }
        return Recipe.from_data(content | changes)

    return make


@pytest.fixture
def quiet():
    return Console(file=StringIO())


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_all_files_of_the_contract(make_recipe, tmp_path, quiet):
    evaluation = {"every": 2, "num_images": 6, "num_steps": 2, "guidance": [1.0, 3.0], "rewards": ["shapes"]}
    recipe = make_recipe(evaluate=evaluation, track=["tensorboard"])
    folder = train(recipe, tmp_path / "run", console=quiet)
    assert Recipe.from_yaml(folder / "recipe.yaml") == recipe
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "agsm/loss", "agsm/grad_norm", "seconds"} <= set(rows[0])
    assert (folder / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "before_after.png",
        "eval",
        "step-00000000.png",
        "step-00000002.png",
        "step-00000004.png",
    ]
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    images = sorted(str(path.relative_to(folder / "samples" / "eval")) for path in (folder / "samples").rglob("0*.png"))
    sides = [f"guidance-{guidance}/{side}" for guidance in (1, 3) for side in ("base", "trained")]
    assert images == [f"{side}/{number:04d}.png" for side in sides for number in range(6)]
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    measured = json.loads((folder / "eval.json").read_text())
    assert {"suite", "num_images", "overall", "tags", "strict", "base", "difference"} <= set(measured)
    assert (measured["guidance"], measured["other_guidances"][0]["guidance"], measured["step"]) == (1.0, 3.0, 4)
    assert set(next(iter(measured["tags"].values()))) == {"correct", "total", "score", "low", "high"}


def test_a_second_run_in_the_same_folder_is_refused(make_recipe, tmp_path, quiet):
    train(make_recipe(steps=1), tmp_path / "run", console=quiet)
    with pytest.raises(UserError, match="is not empty.*--resume"):
        train(make_recipe(steps=1), tmp_path / "run", console=quiet)


def test_a_second_run_leaves_the_folder_of_the_first_alone(make_recipe, tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    for folder in (first, second):
        folder.check(make_recipe(), resume=False)
    first.open(make_recipe())
    with pytest.raises(UserError, match="is busy"):
        second.open(make_recipe())
    second.discard_unused()
    assert first.recipe.is_file()
    first.discard_unused()
    assert not first.path.exists()


def test_temporary_files_of_a_killed_run_do_no_harm(make_recipe, tmp_path, quiet):
    folder = train(make_recipe(steps=1), tmp_path / "run", console=quiet)
    (folder / ".adapter-best.new").mkdir()
    (folder / ".adapter-best.new" / "tokens.safetensors").write_bytes(b"half")
    (folder / ".eval.json.1.new").write_text("{")
    train(make_recipe(steps=2), folder, resume=True, console=quiet)
    assert not list(folder.glob(".*.new"))


def test_each_exported_adapter_says_where_it_comes_from(make_recipe, tmp_path, quiet, tiny_checkpoint):
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 16}
    terms = [{"use": "agsm", "source": pairs}, {"use": "score_matching", "source": pairs}]
    adapters = {"lora": {"use": "lora", "rank": 2}, "tokens": {"use": "soft_tokens"}}
    folder = train(make_recipe(steps=3, objectives=terms, adapters=adapters), tmp_path / "run", console=quiet)
    assert (folder / "adapter" / "README.md").read_text().startswith("---\n")  # the model card
    files = sorted((folder / "adapter").glob("*.safetensors"))
    assert [file.name for file in files] == ["pytorch_lora_weights.safetensors", "tokens.safetensors"]
    for file in files:
        _, metadata = read_export(file)
        assert metadata["base"] == metadata["backbone"] == "stable_diffusion"
        assert metadata["checkpoint"] == str(tiny_checkpoint)
        assert json.loads(metadata["objectives"]) == ["agsm", "score_matching"]
        assert (metadata["step"], metadata["version"]) == ("3", __version__)
        assert metadata["recipe_sha256"] == hashlib.sha256((folder / "recipe.yaml").read_bytes()).hexdigest()


def test_a_folder_in_which_another_process_trains_is_refused(make_recipe, tmp_path, quiet):
    folder = train(make_recipe(steps=1), tmp_path / "run", console=quiet)
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="is busy"):
        train(make_recipe(steps=2), folder, resume=True, console=quiet)


def test_a_run_that_cannot_start_leaves_no_folder(make_recipe, tmp_path, quiet):
    recipe = make_recipe()
    recipe.backbone = recipe.backbone.model_validate(
        {"use": "stable_diffusion", **recipe.backbone.options, "checkpoint": str(tmp_path / "missing")}
    )
    with pytest.raises(UserError, match="backbone"):
        train(recipe, tmp_path / "run", console=quiet)
    assert not (tmp_path / "run").exists()


def test_a_signal_stops_with_a_checkpoint_from_which_the_run_continues(make_recipe, tmp_path, quiet, monkeypatch):
    run_step = Trainer.run_step

    def with_signal(trainer):
        metrics = run_step(trainer)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    monkeypatch.setattr(Trainer, "run_step", with_signal)
    with pytest.raises(Stopped, match="after step 3. To continue: .*--resume") as stopped:
        train(make_recipe(), tmp_path / "run", console=quiet)
    assert stopped.value.exit_code == 143
    monkeypatch.setattr(Trainer, "run_step", run_step)
    train(make_recipe(), tmp_path / "run", resume=True, console=quiet)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_resuming_with_another_recipe_is_refused_and_more_steps_are_not(make_recipe, tmp_path, quiet):
    train(make_recipe(steps=2), tmp_path / "run", console=quiet)
    with pytest.raises(UserError, match="started with seed = 0, but now it is 1"):
        train(make_recipe(steps=3, seed=1), tmp_path / "run", resume=True, console=quiet)
    train(make_recipe(steps=3), tmp_path / "run", resume=True, console=quiet)
    assert steps_of(tmp_path / "run") == [1, 2, 3]


def test_lines_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.add(step, {"loss": float("nan") if step == 1 else 0.5})
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')
    metrics.cut(2)
    rows = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def adapter_of(folder):
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def test_a_run_that_starts_from_another_has_its_adapters_and_their_ema(make_recipe, tmp_path, quiet):
    first = train(make_recipe(), tmp_path / "first", console=quiet)
    trainer = build_trainer(make_recipe(start_from=str(first)))
    live = {name.removeprefix("lora."): value for name, value in trainer.policy.state_dict()["live"].items()}
    assert {f"unet.{name.removeprefix('positive.')}.weight" for name in live if "positive" in name} <= set(
        adapter_of(first)
    )
    for name, value in live.items():
        bank, _, rest = name.partition(".")
        kept = adapter_of(first)[f"{'negative.' if bank == 'negative' else ''}unet.{rest}.weight"]
        assert torch.equal(value, kept)
        assert torch.equal(trainer.policy.state_dict()["ema"][f"lora.{name}"], kept)


def test_a_resumed_run_does_not_start_from_the_other_run_again(make_recipe, tmp_path, quiet):
    first = train(make_recipe(), tmp_path / "first", console=quiet)
    recipe = make_recipe(start_from=str(first))
    whole = train(recipe, tmp_path / "whole", console=quiet)
    shutil.rmtree(first)
    (whole / "checkpoints" / "step-00000004.pt").unlink()
    before = adapter_of(whole)
    train(recipe, whole, resume=True, console=quiet)
    assert all(torch.equal(before[name], value) for name, value in adapter_of(whole).items())


def test_adapters_that_the_start_lacks_start_fresh_beside_the_others(make_recipe, tmp_path, quiet):
    """As AGSM's soft tokens on top of a LoRA that a reward has trained, which stays as it is."""
    first = train(make_recipe(), tmp_path / "first", console=quiet)
    lora = {"use": "lora", "rank": 2, "banks": 2}
    changes = {"start_from": str(first), "adapters": {"lora": lora, "tokens": {"use": "soft_tokens", "num_tokens": 2}}}
    recipe = make_recipe(**changes)
    recipe.objectives[0].trains = ["tokens"]
    trainer = build_trainer(recipe)
    assert "new: tokens" in describe(recipe, trainer) and "parameters frozen" in describe(recipe, trainer)
    assert all(name.startswith("tokens.") for name in trainer.parameters) and trainer.trained == ["tokens"]
    new = trainer.policy.state_dict()["live"]
    whole = train(recipe, tmp_path / "whole", console=quiet)
    before, after = adapter_of(first), adapter_of(whole)
    assert before.keys() == after.keys() and all(torch.equal(before[name], value) for name, value in after.items())
    tokens = load_file(whole / "adapter" / "tokens.safetensors")
    fresh = {name.removeprefix("tokens."): value for name, value in new.items() if name.startswith("tokens.")}
    assert fresh and not all(torch.equal(fresh[name], tokens[name]) for name in fresh)


def test_starting_from_adapters_that_do_not_fit_is_refused(make_recipe, tmp_path, quiet):
    with pytest.raises(UserError, match="start_from: .*there is no such file or folder"):
        build_trainer(make_recipe(start_from=str(tmp_path / "nothing")))
    first = train(make_recipe(), tmp_path / "first", console=quiet)
    with pytest.raises(UserError, match="holds no adapter 'mine'; it holds: lora"):
        build_trainer(make_recipe(start_from=str(first), adapters={"mine": {"use": "lora", "rank": 2, "banks": 2}}))
    adapters = {"mine": {"use": "lora", "rank": 2}, "lora": {"use": "lora", "rank": 2, "banks": 2}}
    recipe = make_recipe(start_from=str(first), adapters=adapters)
    build_trainer(recipe)
    recipe.objectives[0].trains = ["lora"]
    with pytest.raises(UserError, match="has no adapter 'mine', so it begins new, and no term trains it"):
        build_trainer(recipe)
    adapters = {"tokens": {"use": "soft_tokens"}}
    with pytest.raises(UserError, match=r"none of its adapters is continued: it holds lora \(lora\).*are tokens. List"):
        build_trainer(make_recipe(start_from=str(first), adapters=adapters))
    with pytest.raises(UserError, match="its adapter 'lora' is a lora, but here it is a soft_tokens"):
        build_trainer(make_recipe(start_from=str(first), adapters={"lora": {"use": "soft_tokens"}}))
    with pytest.raises(UserError, match="another rank or base"):
        build_trainer(make_recipe(start_from=str(first), adapters={"lora": {"use": "lora", "rank": 3, "banks": 2}}))


def test_a_run_of_several_terms_ends_by_saying_whether_they_agreed(make_recipe, tmp_path, quiet, capsys):
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 16}
    evaluation = {"num_images": 6, "num_steps": 2, "guidance": 1.0}
    terms = [{"use": "agsm", "source": pairs}, {"use": "score_matching", "source": pairs}]
    folder = train(make_recipe(objectives=terms, evaluate=evaluation), tmp_path / "run", console=quiet)
    (found,) = json.loads((folder / "eval.json").read_text())["agreement"]
    assert (found["first"], found["second"], found["steps"]) == ("agsm", "score_matching", 4)
    assert "the gradients of agsm and score_matching" in " ".join(capsys.readouterr().out.split())


def test_a_run_on_its_own_images_counts_them(make_recipe, tmp_path, quiet):
    rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"brightness": 1.0}}
    rollouts |= {"num_prompts": 2, "images_per_prompt": 2, "num_steps": 2, "guidance": 1.0, "updates": 2}
    recipe = make_recipe(steps=3, objectives=[{"use": "ddpo", "source": rollouts}])
    folder = train(recipe, tmp_path / "run", console=quiet)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [4, 4, 8]
    train(recipe.model_copy(update={"steps": 5}), folder, resume=True, console=quiet)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [4, 4, 8, 8, 12]


def test_a_run_that_evaluates_nothing_has_a_report_of_its_curves_and_samples(make_recipe, tmp_path, quiet):
    folder = train(make_recipe(steps=1), tmp_path / "run", console=quiet)
    page = (folder / "report.html").read_text()
    assert "How run learned." in page and "run: samples" in page and "agsm/grad_norm" in page


def test_a_failing_report_is_reported_and_does_not_fail_the_run(make_recipe, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr("agsm_rl.report.page.write_report", lambda *_: 1 / 0)
    folder = train(make_recipe(evaluate={"num_images": 6, "num_steps": 2}), tmp_path / "run", console=quiet)
    assert (folder / "eval.json").is_file() and not (folder / "report.html").exists()
    said = " ".join(quiet.file.getvalue().split())
    assert "report.html was not written (ZeroDivisionError" in said and "agsm-rl report" in said


def stopping_in_evaluation(monkeypatch, at):
    """SIGTERM when the batch number `at` (from 1) of all evaluations is drawn."""
    drawn = []
    draw = suite.draw

    def noted(*arguments, **options):
        drawn.append(1)
        if len(drawn) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments, **options)

    monkeypatch.setattr(suite, "draw", noted)


EVALUATION = {"every": 2, "num_images": 6, "num_steps": 2, "batch_size": 3, "rewards": ["shapes"]}


def test_a_signal_in_the_last_evaluation_keeps_all_steps_and_says_how_to_continue(
    make_recipe, tmp_path, quiet, monkeypatch
):
    recipe = make_recipe(evaluate=EVALUATION | {"every": None}, sample={"every": 100})
    stopping_in_evaluation(monkeypatch, 1)
    with pytest.raises(Stopped, match="after step 4.* in the evaluation.*To continue: .*--resume") as stopped:
        train(recipe, tmp_path / "run", console=quiet)
    assert stopped.value.exit_code == 143
    assert not (tmp_path / "run" / "eval.json").exists()
    kept = adapter_of(tmp_path / "run")
    train(recipe, tmp_path / "run", resume=True, console=quiet)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["step"] == 4
    assert all(torch.equal(kept[name], value) for name, value in adapter_of(tmp_path / "run").items())


def test_an_evaluation_that_a_signal_interrupts_is_repeated(make_recipe, tmp_path, quiet, monkeypatch):
    recipe = make_recipe(evaluate=EVALUATION, checkpoint={"every": 100}, sample={"every": 100}, export="ema")
    whole = train(recipe, tmp_path / "whole", console=quiet)
    stopping_in_evaluation(monkeypatch, 1)  # the base's figures are kept from the first run
    with pytest.raises(Stopped, match="after step 2. To continue: .*--resume"):
        train(recipe, tmp_path / "run", console=quiet)
    train(recipe, tmp_path / "run", resume=True, console=quiet)
    assert (tmp_path / "run" / "evaluations.jsonl").read_text() == (whole / "evaluations.jsonl").read_text()
    assert all(torch.equal(adapter_of(whole)[name], value) for name, value in adapter_of(tmp_path / "run").items())

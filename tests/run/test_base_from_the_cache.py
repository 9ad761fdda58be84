"""A run that reads the base's figures from the cache: the same files, and the base is not drawn."""

import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from agsm_rl.evaluate import measured
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.report.page import write_report
from agsm_rl.run.lifecycle import train

PAIRS = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 8}
EVALUATE = {"num_images": 3, "num_steps": 1, "guidance": [1.0, 2.0], "rewards": ["brightness"]}


@pytest.fixture
def run(tiny_checkpoint, tmp_path, monkeypatch):
    """Train a step and evaluate; returns the folder, what was printed, and how often the base was drawn."""

    def run(name: str, **changes):
        recipe = Recipe.from_data(
            {
                "steps": 1,
                "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
                "adapters": {"lora": {"use": "lora", "rank": 2}},
                "objectives": [{"use": "score_matching", "source": PAIRS}],
                "optimizer": {"learning_rate": 0.03},
                "evaluate": EVALUATE | changes,
                "sample": {"prompts": ["a red star"], "num_images": 1, "num_steps": 1},
                "track": [],
            }
        )
        drawn, draw = [], measured.draw_and_judge

        def noting(backbone, *arguments, **options):
            drawn.append(not any(adapter.bank for adapter in backbone.adapters))
            return draw(backbone, *arguments, **options)

        screen = StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(measured, "draw_and_judge", noting)
            folder = train(recipe, tmp_path / name, console=Console(file=screen, width=1000))
        assert len(drawn) - sum(drawn) == 2  # the trained model, at two guidances
        return folder, screen.getvalue(), sum(drawn)

    return run


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("samples/**/*.png")}


def test_a_run_with_a_warm_cache_draws_no_base_and_writes_the_same_files(run, tmp_path):
    cold, said, drawn = run("a/run")
    assert drawn == 2 and "are read from" not in said
    warm, said, drawn = run("b/run")
    assert drawn == 0
    assert said.count("the base's figures of shapes, measured earlier with the same settings, are read from") == 1
    for name in ("eval.json", "evaluations.jsonl"):
        assert (cold / name).read_bytes() == (warm / name).read_bytes()
    assert pictures(cold) == pictures(warm) and "samples/before_after.png" in pictures(warm)
    shutil.copyfile(cold / "metrics.jsonl", warm / "metrics.jsonl")  # which have the seconds of each step
    for folder in (cold, warm):
        write_report([folder], folder / "again.html")
    reports = [(folder / "again.html").read_text() for folder in (cold, warm)]
    assert reports[0].replace(str(tmp_path / "a"), "") == reports[1].replace(str(tmp_path / "b"), "")

"""The shapes suite: the contract's eval.json, fair comparison, and a table and picture that show it."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate import before_after
from agsm_rl.evaluate.drawing import to_picture
from agsm_rl.evaluate.suite import Judged
from agsm_rl.evaluate.suites import shapes
from agsm_rl.shapes import world


def painter(share: float):
    """A model that draws right with the given probability, else what a careless eye takes the prompt for."""

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            requirement = world.parse(prompt)
            if rng.random() >= share:
                requirement = world.wrong_requirement(requirement)
            drawn = np.array(world.render(world.draw_scene(rng, requirement, allow_unseen=True)))
            images.append(torch.from_numpy(drawn).permute(2, 0, 1) / 255)
        return torch.stack(images)

    return draw


def judged(draw, prompts: list[str]) -> shapes.ShapesResult:
    """The suite's result on what a model draws for prompts, image i from seed i, as 8-bit pictures."""
    suite = shapes.Shapes(num_images=len(prompts))
    pictures = [to_picture(image) for image in draw(prompts, list(range(len(prompts))))]
    metadata = [{"prompt": prompt} for prompt in prompts]
    rows = zip(metadata, suite.judge(pictures, prompts, metadata), strict=True)
    return suite.result([Judged(index, 0, row, verdict) for index, (row, verdict) in enumerate(rows)])


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return shapes.suite_prompts("held_out", 60, seed=0)


@pytest.fixture(scope="module")
def half(prompts) -> shapes.ShapesResult:
    return judged(painter(0.5), prompts)


@pytest.fixture(scope="module")
def perfect(prompts) -> shapes.ShapesResult:
    return judged(painter(1.0), prompts)


def test_a_third_of_the_suite_is_counting_and_all_tags_are_there(prompts) -> None:
    tags = Counter(world.parse(prompt).tag for prompt in prompts)
    assert tags == {tag: 20 if tag == "counting" else 8 for tag in world.TAGS}


def test_a_model_that_draws_right_scores_one(perfect) -> None:
    for strict in (False, True):
        scores = perfect.shares(strict=strict)
        assert scores.overall.value == 1
        assert all(share.value == 1 and share.low < 1 for share in scores.tags.values())


def test_overall_is_the_mean_over_tags_not_over_images() -> None:
    rows = [shapes.ImageVerdict("a star", "single_object", True, True, "")]
    rows += [shapes.ImageVerdict("two red stars", "counting", False, False, "none")] * 3
    assert shapes.ShapesResult(tuple(rows)).shares(strict=False).overall.value == 0.5


def test_eval_json_has_the_form_of_the_contract_and_is_read_back(half) -> None:
    content = json.loads(json.dumps(half.to_json()))
    assert content["suite"] == "shapes" and content["num_images"] == 60
    for part in (content, content["strict"]):
        assert part["overall"] == pytest.approx(np.mean([row["score"] for row in part["tags"].values()]))
        for row in part["tags"].values():
            assert set(row) == {"correct", "total", "score", "low", "high"}
            assert row["low"] <= row["score"] == row["correct"] / row["total"] <= row["high"]
    assert shapes.ShapesResult.from_json(content) == half


def test_an_unclean_extra_costs_the_strict_verdict_only() -> None:
    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        drawn = np.array(world.render((world.DrawnObject("star", "red", 9.0, 9.0, 5.0),)))
        drawn[20:24, 20:24] = world.COLORS["red"]
        return torch.from_numpy(drawn).permute(2, 0, 1)[None] / 255

    (seen,) = judged(draw, ["a red star"]).verdicts
    assert seen.correct and not seen.strict and "unclean" in seen.reason


def test_the_batch_size_changes_no_verdict(prompts, half) -> None:
    assert judged(painter(0.5), prompts[:10]).verdicts == half.verdicts[:10]


def test_a_better_model_is_told_apart_in_every_tag_and_overall(half, perfect) -> None:
    found = shapes.compare(half, perfect)
    for part in (found.lenient, found.strict):
        assert list(part.tags) == list(world.TAGS)
        assert part.overall.value == pytest.approx(np.mean([tag.value for tag in part.tags.values()]))
        assert part.overall.low > 0


def test_a_model_against_itself_differs_by_nothing(half) -> None:
    found = shapes.compare(half, half)
    assert found.strict.overall.value == 0 and not found.strict.overall.excludes_zero


def test_results_on_different_prompts_are_not_compared(half, prompts) -> None:
    with pytest.raises(UserError, match="different prompts"):
        shapes.compare(half, judged(painter(1.0), prompts[:5]))


def test_a_foreign_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="a red dog"):
        shapes.Shapes().check({"prompt": "a red dog"})


def test_a_base_of_another_world_is_refused_before_it_is_loaded_with_what_to_write_instead() -> None:
    result = CliRunner().invoke(app, ["eval", "owner/a-model-of-photographs"])
    assert result.exit_code == 2
    assert "'owner/a-model-of-photographs' was not trained on it" in result.stderr
    assert "--suite rewards --prompts prompts.txt --reward" in result.stderr


def test_the_table_fits_eighty_columns_and_shows_base_trained_and_difference(half, perfect) -> None:
    console = Console(width=80, record=True, quiet=True)
    shapes.print_table(half, perfect, console=console)
    with Console(width=80) as plain, plain.capture() as shown:
        plain.print(shapes.table(half, perfect, strict=True))
    text = shown.get()
    assert "…" not in text
    assert "difference" in text and "strict" in text
    assert all(tag in text for tag in world.TAGS)
    assert f"{100 * perfect.shares(strict=True).overall.value:.1f} [" in text


def test_the_table_of_one_model_has_no_difference(half) -> None:
    with Console(width=80) as plain, plain.capture() as shown:
        plain.print(shapes.table(half, strict=False))
    assert "score" in shown.get() and "difference" not in shown.get()


def test_the_picture_frames_right_images_green_and_wrong_ones_red(prompts) -> None:
    seeds = list(range(5))
    images = [to_picture(image) for image in painter(0.5)(prompts[:5], seeds)]
    drawn = before_after.picture(prompts[:5], images, images, [(True, False)] * 5)
    first_right = before_after.GAP, before_after.GAP
    first_wrong = 2 * before_after.GAP + 32 * 3 + 2 * before_after.FRAME, before_after.GAP
    assert drawn.getpixel(first_right) == before_after.RIGHT
    assert drawn.getpixel(first_wrong) == before_after.WRONG
    assert drawn.width > 4 * 2 * 32 * 3 and drawn.height > 2 * 32 * 3

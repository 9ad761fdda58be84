"""The shapes reward: 1 for exactly what was asked for, and a graded form that extra objects cannot raise."""

import numpy as np
import pytest
import torch
from agsm_rl_rewards.shapes import ShapesReward
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Reward
from agsm_rl.shapes import world
from agsm_rl.shapes.world import DrawnObject
from agsm_rl.training.defaults import with_defaults


def draw(*objects: tuple[str, str, float, float]) -> Tensor:
    drawn = world.render(tuple(DrawnObject(shape, color, x, y, 4.5) for color, shape, x, y in objects))
    return torch.from_numpy(np.array(drawn)).permute(2, 0, 1) / 255


PROMPT = "two red stars"
ONE, TWO = ("red", "star", 7.0, 7.0), ("red", "star", 24.0, 7.0)
IMAGES = {
    "right": draw(ONE, TWO),
    "one extra": draw(ONE, TWO, ("blue", "circle", 16, 24)),
    "two extra": draw(ONE, TWO, ("blue", "circle", 8, 24), ("blue", "circle", 24, 24)),
    "one missing": draw(ONE),
    "one of another colour": draw(ONE, ("blue", "star", 24, 7)),
    "one too many": draw(ONE, TWO, ("red", "star", 16, 24)),
    "blank": draw(),
}


def scores(verdict: str) -> dict[str, float]:
    reward = ShapesReward(verdict=verdict)  # type: ignore[arg-type]
    given = reward(torch.stack(list(IMAGES.values())), [PROMPT] * len(IMAGES))
    return dict(zip(IMAGES, given.tolist(), strict=True))


def test_it_follows_the_interface() -> None:
    reward = ShapesReward()
    assert isinstance(with_defaults(reward, Reward), Reward)
    assert (reward.name, reward.range, reward.differentiable) == ("shapes", (0.0, 1.0), False)
    given = reward(torch.stack([IMAGES["right"]] * 2), [PROMPT, "a blue circle"])
    assert given.dtype == torch.float32 and given.tolist() == [1.0, 0.0]


def test_the_strict_reward_is_one_for_exactly_what_was_asked_for() -> None:
    assert [name for name, score in scores("strict").items() if score == 1] == ["right"]


def test_the_lenient_reward_forgives_extras_of_another_kind() -> None:
    assert [name for name, score in scores("lenient").items() if score == 1] == ["right", "one extra", "two extra"]


def test_the_graded_reward_is_one_only_where_the_strict_one_is_and_orders_the_rest() -> None:
    graded = scores("graded")
    assert [name for name, score in graded.items() if score == 1] == ["right"]
    assert graded["one extra"] == graded["one too many"] == pytest.approx(2 / 3)
    assert graded["two extra"] == graded["one missing"] == pytest.approx(1 / 2)
    assert graded["one of another colour"] == pytest.approx(3 / 4)
    assert graded["blank"] == 0


def test_the_graded_reward_never_rises_when_an_object_is_added_to_a_drawing_that_has_enough() -> None:
    graded = scores("graded")
    assert graded["right"] > graded["one extra"] > graded["two extra"]


def test_a_wrong_position_halves_the_graded_reward() -> None:
    image = draw(("red", "star", 7, 16), ("blue", "circle", 25, 16))[None]
    reward = ShapesReward(verdict="graded")
    assert reward(image, ["a star left of a circle"]).item() == 1
    assert reward(image, ["a star right of a circle"]).item() == 0.5


def test_graded_and_strict_agree_on_what_is_perfect_over_many_drawings() -> None:
    rng = np.random.default_rng(0)
    images, prompts = [], []
    for i in range(60):
        requirement = world.draw_requirement(rng, "train", world.TAGS[i % len(world.TAGS)])
        shown = requirement if i % 4 < 2 else world.wrong_requirement(requirement)
        drawn = np.array(world.render(world.draw_scene(rng, shown, allow_unseen=True)))
        images.append(torch.from_numpy(drawn).permute(2, 0, 1) / 255)
        prompts.append(world.describe(requirement, rng))
    strict, graded = (ShapesReward(verdict=kind)(torch.stack(images), prompts) for kind in ("strict", "graded"))
    assert torch.equal(strict == 1, graded == 1) and 0 < strict.mean() < 1


def test_a_foreign_prompt_and_an_unknown_verdict_are_refused() -> None:
    with pytest.raises(UserError, match="a red dog"):
        ShapesReward()(IMAGES["right"][None], ["a red dog"])
    with pytest.raises(UserError, match="Did you mean 'strict'"):
        ShapesReward(verdict="strickt")  # type: ignore[arg-type]


def test_images_and_prompts_must_be_as_many() -> None:
    with pytest.raises(ValueError):
        ShapesReward()(IMAGES["right"][None], [PROMPT, PROMPT])

"""The judge is right on real drawings, forgives softness, and rejects what is no clean object."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from agsm_rl.shapes import world
from agsm_rl.shapes.detect import detect
from agsm_rl.shapes.judge import judge
from agsm_rl.shapes.world import DrawnObject, Scene

RADIUS = 5.0


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def scenes(rng: np.random.Generator, num: int) -> list[Scene]:
    """Drawings of all tags, half of them held out."""
    made = []
    for i in range(num):
        requirement = world.draw_requirement(rng, ("train", "held_out")[i % 2], world.TAGS[i // 2 % len(world.TAGS)])
        made.append(world.draw_scene(rng, requirement, allow_unseen=True))
    return made


def soften(image: np.ndarray, rng: np.random.Generator, *, blur: float, noise: float) -> np.ndarray:
    values = gaussian_filter(image.astype(float), (blur, blur, 0)) + rng.normal(0, 255 * noise, image.shape)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def draw(*objects: tuple[str, str, float, float]) -> np.ndarray:
    return np.asarray(world.render(tuple(DrawnObject(shape, color, x, y, RADIUS) for color, shape, x, y in objects)))


def is_right(scene: Scene, image: np.ndarray) -> bool:
    verdict = judge(image, scene.requirement)
    drawn, seen = (Counter((item.shape, item.color) for item in part) for part in (scene.objects, verdict.objects))
    return verdict.correct and verdict.strict and not verdict.reason and drawn == seen


def test_at_least_995_of_1000_real_drawings_are_judged_right(rng) -> None:
    right = [is_right(scene, np.asarray(world.render(scene))) for scene in scenes(rng, 1000)]
    assert np.mean(right) >= 0.995


@pytest.mark.parametrize(("blur", "noise"), [(0.4, 0.0), (0.0, 0.03), (0.4, 0.03)])
def test_softness_and_noise_as_of_an_autoencoder_are_forgiven(rng, blur, noise) -> None:
    made = scenes(rng, 120)
    right = [is_right(scene, soften(np.asarray(world.render(scene)), rng, blur=blur, noise=noise)) for scene in made]
    assert np.mean(right) >= 0.97


def test_a_wrong_drawing_is_never_called_right(rng) -> None:
    for scene in scenes(rng, 180):
        wrong = world.wrong_requirement(scene.requirement)
        image = world.render(world.draw_scene(rng, wrong, allow_unseen=True))
        verdict = judge(image, scene.requirement)
        assert not verdict.strict and verdict.reason
        assert not verdict.correct


def test_strong_blur_is_rejected(rng) -> None:
    for scene in scenes(rng, 60):
        seen = detect(soften(np.asarray(world.render(scene)), rng, blur=1.5, noise=0.0))
        assert not seen.objects and seen.rejected


def test_two_overlapping_objects_of_one_colour_are_not_counted_as_clean(rng) -> None:
    clean = 0
    for _ in range(100):
        angle, far = rng.uniform(0, 2 * np.pi), RADIUS * rng.uniform(0.8, 1.4)
        x, y = np.cos(angle) * far / 2, np.sin(angle) * far / 2
        first, second = rng.choice(world.SHAPES, size=2)
        clean += not detect(draw(("red", first, 16 - x, 16 - y), ("red", second, 16 + x, 16 + y))).rejected
    assert clean <= 10


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize(("x", "y"), [(0, 16), (32, 16), (16, 0), (16, 32)])
def test_an_object_cut_in_half_by_the_border_is_rejected(shape, x, y) -> None:
    seen = detect(draw(("blue", shape, x, y)))
    assert not seen.objects and len(seen.rejected) == 1


@pytest.mark.parametrize("shape", ["circle", "square", "star"])
def test_half_an_object_is_rejected(shape) -> None:
    image = draw(("blue", shape, 16, 16)).copy()
    image[:, 16:] = world.BACKGROUND
    seen = detect(image)
    assert not seen.objects and seen.rejected


def test_an_unclear_colour_is_rejected() -> None:
    image = draw(("red", "circle", 16, 16)).copy()
    grey = np.abs(image.astype(int) - world.BACKGROUND).sum(axis=-1) > 100
    image[grey] = (120, 120, 120)
    seen = detect(image)
    assert not seen.objects and seen.rejected[0].reason == "its colour is unclear"


def test_a_faint_ghost_beside_an_object_is_rejected() -> None:
    ghost = 245 - (245 - draw(("green", "square", 24, 24)).astype(float)) * 0.4
    image = np.minimum(draw(("red", "star", 8, 8)), ghost.astype(np.uint8))
    verdict = judge(image, world.parse("a red star"))
    assert verdict.correct and not verdict.strict and "unclean" in verdict.reason


def test_a_blank_image_shows_nothing() -> None:
    verdict = judge(draw(), world.parse("a star"))
    assert not verdict.correct and not verdict.objects and not verdict.rejected
    assert verdict.reason == "expected one star, found 0"


def test_extra_objects_are_forgiven_by_the_lenient_verdict_only() -> None:
    image = draw(("red", "star", 8, 8), ("blue", "circle", 24, 24))
    verdict = judge(image, world.parse("a red star"))
    assert verdict.correct and not verdict.strict and verdict.reason == "an extra blue circle"


def test_one_object_too_many_fails_counting_in_any_colour() -> None:
    image = draw(("red", "star", 7, 7), ("red", "star", 24, 7), ("blue", "star", 16, 24))
    verdict = judge(image, world.parse("two red stars"))
    assert not verdict.correct and "expected two stars, found 3" in verdict.reason


def test_swapped_colours_are_wrong() -> None:
    image = draw(("red", "star", 8, 8), ("blue", "circle", 24, 24))
    assert judge(image, world.parse("a red star and a blue circle")).strict
    assert not judge(image, world.parse("a blue star and a red circle")).correct


@pytest.mark.parametrize(
    ("x", "y", "relation"), [(6, 16, "left of"), (26, 16, "right of"), (16, 6, "above"), (16, 26, "below")]
)
def test_each_relation_holds_where_the_first_object_stands(x, y, relation) -> None:
    image = draw(("red", "square", x, y), ("blue", "circle", 32 - x, 32 - y))
    for asked in world.RELATIONS:
        assert judge(image, world.parse(f"a square {asked} a circle")).correct == (asked == relation)


def test_an_exact_diagonal_is_both_beside_and_above() -> None:
    image = draw(("red", "square", 7, 7), ("blue", "circle", 25, 25))
    held = [name for name in world.RELATIONS if judge(image, world.parse(f"a square {name} a circle")).correct]
    assert held == ["left of", "above"]


def test_every_form_and_size_of_an_image_gives_the_same_verdict() -> None:
    image = draw(("red", "star", 8, 8), ("blue", "circle", 24, 24))
    requirement = world.parse("a red star and a blue circle")
    large = np.kron(image, np.ones((4, 4, 1), dtype=np.uint8))
    as_tensor = [torch.from_numpy(part.copy()).permute(2, 0, 1).float() / 255 for part in (image, large)]
    for form in (image, Image.fromarray(image), large, Image.fromarray(large), *as_tensor):
        assert judge(form, requirement).strict


def test_an_image_that_is_not_finite_is_no_blank_image() -> None:
    with pytest.raises(ValueError, match="not finite"):
        detect(torch.full((3, 32, 32), float("nan")))

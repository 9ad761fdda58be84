"""What the middle of a transformer is told of the drawing, and that it learns it."""

import numpy as np
import torch
from tiny_pipelines import SD3_POOLED, tiny_transformer

from agsm_rl.shapes.scenes import DrawnObject, Requirement, Scene
from agsm_rl.shapes.train_base.representation import WEIGHT, Representation, drawn_at
from agsm_rl.shapes.worlds import SCENES


def scene(*objects: DrawnObject) -> Scene:
    return Scene(Requirement("any", ()), objects)


def test_the_shape_and_colour_at_each_place_are_those_of_the_object_that_covers_it() -> None:
    square = DrawnObject("square", "red", 6.0, 6.0, 6.0)
    ring = DrawnObject("ring", "blue", 22.0, 20.0, 9.0)
    shapes, colors = drawn_at([scene(square, ring)], SCENES.look, tokens=8)[0].reshape(2, 8, 8)
    names = ["", *SCENES.look.shapes], ["", *SCENES.look.colors]
    assert names[0][shapes[1, 1]] == "square" and names[1][colors[1, 1]] == "red"
    assert names[0][shapes[5, 3]] == "ring" and names[1][colors[5, 3]] == "blue"
    assert shapes[5, 5] == colors[5, 5] == 0  # the hole of the ring shows the background
    assert shapes[0, 7] == 0 and ((shapes > 0) == (colors > 0)).all()


def test_what_is_drawn_there_agrees_with_the_pixels() -> None:
    rng = np.random.default_rng(0)
    scenes = [SCENES.draw_scene(rng, SCENES.draw_requirement(rng)) for _ in range(50)]
    colors = drawn_at(scenes, SCENES.look, tokens=8)[:, 1].reshape(-1, 8, 8)
    agreeing, background = [], []
    for one, told in zip(scenes, colors, strict=True):
        center = np.asarray(SCENES.render(one), dtype=float)[1::4, 1::4]  # a pixel in each place's middle
        palette = np.array([SCENES.look.background, *SCENES.look.colors.values()], dtype=float)
        nearest = np.abs(center[:, :, None] - palette).sum(-1).argmin(-1)
        agreeing += [*(nearest == told.numpy())[nearest > 0]]
        background += [*(told.numpy() == 0)[nearest == 0]]
    assert np.mean(agreeing) > 0.9
    assert np.mean(background) > 0.9  # a place whose middle is empty may still be covered in part


def test_the_blocks_up_to_the_middle_learn_from_it_and_those_after_do_not() -> None:
    denoiser = tiny_transformer(patch_size=1)
    rng = np.random.default_rng(0)
    scenes = [SCENES.draw_scene(rng, SCENES.draw_requirement(rng)) for _ in range(2)]
    told = Representation(denoiser, SCENES.look, scenes)
    text = {"encoder_hidden_states": torch.randn(2, 5, 64), "pooled_projections": torch.randn(2, SD3_POOLED)}
    denoiser(torch.randn(2, 16, 8, 8), timestep=torch.ones(2), **text)
    loss = told.loss(np.array([1, 0]))
    loss.backward()
    assert 1.5 < loss.item() / WEIGHT < 3.0  # of nine answers each, before anything is learned: log 9 = 2.2
    learned = [block.attn.to_q.weight.grad is not None for block in denoiser.transformer_blocks]
    assert learned == [True, True, False, False]

"""Captions that are the same to the text encoders: they are not negatives, and data with nothing else are refused."""

import json

import pytest
import torch
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.agsm import AGSM, guided_score_loss
from agsm_rl.objectives.grid import Groups
from agsm_rl.objectives.softrepa import SoftREPA, softrepa_loss
from agsm_rl.sources.pairs import Pairs
from agsm_rl.trainer import Term, Trainer

LOSSES = {
    "agsm": lambda live, ema, target, **options: guided_score_loss(live, ema, target, **options),
    "bradley_terry": lambda live, ema, target, **options: guided_score_loss(
        live, ema, target, preference="bradley_terry", **options
    ),
    "softrepa": lambda live, ema, target, **options: softrepa_loss(live, target, **options),
}


@pytest.fixture
def grids():
    """Predictions, those of the EMA and targets of 3 images under 4 prompts."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 2, 3, 3), (3, 4, 2, 3, 3), (3, 2, 3, 3)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_prompt_that_is_no_negative_changes_nothing(grids, loss):
    live, ema, target = grids
    own = torch.arange(3)
    negatives = torch.ones(3, 4, dtype=torch.bool)
    negatives[:, 3] = False
    value, metrics = loss(live, ema, target, own=own, negatives=negatives)
    expected, others = loss(live[:, :3], ema[:, :3], target, own=own)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(metrics, others)
    everything = torch.ones(3, 4, dtype=torch.bool)
    value, metrics = loss(live, ema, target, own=own, negatives=everything)
    expected, others = loss(live, ema, target, own=own)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(metrics, others)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_images_without_negatives_learn_from_their_own_prompt_alone(grids, loss):
    live, ema, target = grids
    live = live.requires_grad_()
    value, metrics = loss(live, ema, target, own=torch.arange(3), negatives=torch.zeros(3, 4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value, live)
    assert metrics["win_rate"] == 0 and metrics["margin"] == 0
    own = torch.zeros(3, 4, dtype=torch.bool)
    own[range(3), range(3)] = True
    assert gradient[own].abs().min() > 0 and not gradient[~own].any()


def pairs_of(policy, prompts):
    latents = torch.randn(len(prompts), *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return PairBatch(prompts, torch.arange(len(prompts)), latents)


def test_captions_are_compared_as_the_text_encoders_read_them(policy, caplog):
    long = "a star " * 100
    batch = pairs_of(policy, [long + "x", long + "y", "a star", "A  Star"])
    grid = Groups(2, None).grid(policy, batch)
    assert grid.negatives.tolist() == [[False, False], [False, False], [False, False], [False, False]]
    assert Groups(4, None).grid(policy, batch).negatives.tolist() == [
        [False, False, True, True],
        [False, False, True, True],
        [True, True, False, False],
        [True, True, False, False],
    ]
    (message,) = [text for text in caplog.messages if "own caption" in text]
    assert "4 of 4 images have nothing but their own caption in their group ('a star a star" in message
    assert Groups(2, None).grid(policy, pairs_of(policy, ["a star", "a circle", "two", "x"])).negatives is None


@pytest.mark.parametrize("make", [AGSM, SoftREPA])
def test_equal_captions_keep_the_gradient_the_same_in_passes(policy, make):
    batch = pairs_of(policy, ["a star", "a star", "a circle", "a square"])
    for _, parameter in policy.parameters().items():
        parameter.requires_grad_(True)
    gradients = []
    for options in ({}, {"groups_per_pass": 1}, {"images_per_pass": 1}):
        objective = make(group_size=2, **options)
        total = 0
        for part, share in objective.split(batch):
            total = total + share * objective.loss(policy, part)[0]
        parameters = list(policy.parameters().values())
        gradients.append(torch.autograd.grad(total, parameters, allow_unused=True))
    for whole, groups, images in zip(*gradients, strict=True):
        if whole is not None:
            torch.testing.assert_close(whole, groups, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(whole, images, rtol=1e-3, atol=1e-6)


def folder(path, captions):
    path.mkdir()
    for number, _ in enumerate(captions):
        Image.new("RGB", (8, 8)).save(path / f"{number}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "caption": caption}) for n, caption in enumerate(captions)]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("make", [AGSM, SoftREPA])
def test_data_with_fewer_different_captions_than_a_group_has_images_are_refused(policy, tmp_path, make):
    for name, captions, words in (
        ("one", ["a photo of sks dog"] * 8, "only 1 different caption, but the 4 images"),
        ("two", ["a", "b"] * 4, "only 2 different captions, .* set group_size to 2"),
        ("cut", [f"{'a star ' * 100}{n}" for n in range(8)], "only 1 different caption .within the .* tokens"),
    ):
        term = Term(make(), Pairs(folder(tmp_path / name, captions), 4), name="mine")
        with pytest.raises(UserError, match=f"mine: .*{words}"):
            Trainer(policy, [term], steps=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_that_are_cut_are_counted_once(policy, tmp_path, caplog, streaming):
    captions = [f"picture {number}" for number in range(6)] + ["a star " * 100, "a circle " * 100]
    source = Pairs(folder(tmp_path / "x", captions), 8, streaming=streaming)
    trainer = Trainer(policy, [Term(AGSM(), source, name="mine")], steps=2)
    trainer.train()
    (message,) = [text for text in caplog.messages if "cut off" in text]
    among = "the first batch's 8" if streaming else "its 8"
    assert f"mine: 2 of {among} different captions are longer than the {policy.backbone.token_limit} tokens" in message

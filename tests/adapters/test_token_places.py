"""Which blocks of a U-Net see soft tokens, and what the tokens begin as."""

from typing import Any

import pytest
import torch
from attached_tokens import attached, predict, texts_seen

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.errors import UserError


@pytest.mark.parametrize("places", [["down"], ["mid"], ["up"], ["down", "mid"], ["up", "down"]])
def test_only_the_blocks_at_the_chosen_places_see_the_tokens(backbone: StableDiffusion, places: Any) -> None:
    plain = texts_seen(backbone, lambda: predict(backbone))
    tokens = attached(backbone, num_tokens=3, places=places)
    seen = texts_seen(backbone, lambda: predict(backbone))
    longer = {name.split("_")[0] for name in seen if seen[name].shape[1] == plain[name].shape[1] + 3}
    assert longer == set(places)
    assert {name.split("_")[0] for name in tokens.places(backbone)} == set(places)


def test_places_are_kept_in_the_file(backbone: StableDiffusion) -> None:
    tokens = attached(backbone, places=["down"])
    drawn = predict(backbone)
    tensors, metadata = tokens.export()
    assert metadata["places"] == "down"
    tokens.detach()
    back = SoftTokens.from_export(tensors, metadata)
    back.attach(backbone)
    back.load_export(tensors, metadata)
    assert torch.equal(predict(backbone), drawn)
    back.detach()
    other = SoftTokens()
    other.attach(backbone)
    with pytest.raises(UserError, match=r"trained in the down blocks; set `places: \[down\]`"):
        other.load_export(tensors, metadata)


def test_tokens_from_a_normal_distribution_all_differ_and_bos_tokens_are_equal(backbone: StableDiffusion) -> None:
    for init, are_equal in (("normal", False), ("bos", True), (None, True)):
        tokens = SoftTokens(num_tokens=4, init=init)  # type: ignore[arg-type]
        tokens.attach(backbone)
        values = dict(tokens.named_parameters())["soft_tokens"]
        assert torch.equal(values[0, 0], values[0, 1]) is are_equal
        if init == "normal":
            assert values.std().item() == pytest.approx(0.02, rel=0.2)
        tokens.detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"places": []}, "is empty"),
        ({"places": ["dwon"]}, "Did you mean 'down'"),
        ({"init": "bso"}, "Did you mean 'bos'"),
    ],
)
def test_places_and_beginnings_that_do_not_exist_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SoftTokens(**options)

"""The trial of soft tokens' leverage: errors are weighed as errors of the predicted image, on every kind of base."""

import torch
from leverage import image_share, report

from agsm_rl.adapters.lora import LoRA
from agsm_rl.interfaces import Backbone
from agsm_rl.policy import Policy


def test_the_share_turns_an_error_of_the_prediction_into_one_of_the_image(each_backbone: Backbone) -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    generator = torch.Generator().manual_seed(0)
    x0, noise, other = torch.randn(3, 3, *each_backbone.latent_shape, generator=generator)
    # Two pairs of image and noise that make the same x_t: their targets differ as predictions would.
    one, zero = torch.ones_like(x0), torch.zeros_like(x0)
    a, b = each_backbone.add_noise(one, zero, t), each_backbone.add_noise(zero, one, t)
    moved = x0 + 0.01 * other
    balanced = noise - 0.01 * other * a / b
    torch.testing.assert_close(each_backbone.add_noise(moved, balanced, t), each_backbone.add_noise(x0, noise, t))
    error = each_backbone.target(moved, balanced, t) - each_backbone.target(x0, noise, t)
    share = image_share(each_backbone, x0, t)
    torch.testing.assert_close(share * error.abs(), (moved - x0).abs(), rtol=1e-2, atol=1e-5)


def test_its_rows_tell_plain_cued_and_adapted_prompts_apart(backbone: Backbone, capsys) -> None:
    policy = Policy(backbone, {"lora": LoRA(rank=2)}, ema_decay=0.9)
    report(policy, 4, 2.0, "validation", adapted=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines if line[0] == "|"] == ["plain", "cued", "adapted"]
    assert lines[-1].startswith("2 adapted - plain, strict: +0.0 [")  # an adapter that has not learned yet

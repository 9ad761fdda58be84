"""Edits by any model and adapter: the method that fits, its published settings, adapters on, off and under ψ⁻."""

import pytest
import torch

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.editing.editor import EditSettings, edit, edit_latents, is_flow
from agsm_rl.editing.inversion import invert
from agsm_rl.errors import UserError
from agsm_rl.policy import Policy
from agsm_rl.training.guidance import guiding

TWO_STEPS = EditSettings(num_steps=2, guidance=3.0, strength=1.0)


def latents_of(backbone, count=1):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(5))


def test_a_flow_model_is_edited_by_flowedit_as_published_and_any_other_by_inversion(backbone, sd3_backbone):
    assert is_flow(sd3_backbone) and not is_flow(backbone)
    published = EditSettings().complete(sd3_backbone)
    assert (published.method, published.num_steps, published.n_max) == ("flowedit", 50, 33)
    assert (published.source_guidance, published.guidance) == (3.5, 13.5)
    assert (published.n_min, published.n_avg, published.passes) == (0, 1, 66)
    inverted = EditSettings().complete(backbone, guidance=5.0)
    assert (inverted.method, inverted.num_steps, inverted.n_max) == ("inversion", 50, 50)
    assert (inverted.source_guidance, inverted.guidance, inverted.passes) == (1.0, 5.0, 100)
    assert EditSettings(method="inversion").complete(sd3_backbone).guidance == sd3_backbone.drawing[0]


def test_a_model_of_velocities_is_not_taken_for_a_flow(backbone):
    backbone._scheduler.register_to_config(prediction_type="v_prediction")
    assert not is_flow(backbone)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "flowedit"}, "flowedit needs a model that predicts a flow"),
        ({"method": "magic"}, "magic"),
        ({"n_avg": 2}, "n_avg: belongs to FlowEdit"),
        ({"n_min": 0}, "n_min: belongs to FlowEdit"),
        ({"strength": 0.0}, "strength: got 0.0"),
        ({"strength": 1.5}, "strength: got 1.5"),
        ({"strength": float("nan")}, "strength: got nan"),
        ({"num_steps": 0}, "num_steps: got 0"),
    ],
)
def test_settings_that_a_noise_model_does_not_take_are_refused(backbone, settings, words):
    with pytest.raises(UserError, match=words):
        EditSettings(**settings).complete(backbone)


def test_an_edit_is_an_image_that_depends_on_both_prompts_and_flowedits_on_its_own_seed(each_backbone):
    size = (3, each_backbone.resolution, each_backbone.resolution)
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))

    def edited(source, target, seeds):
        return edit(each_backbone, images, [source] * 2, [target] * 2, seeds=seeds, settings=TWO_STEPS)

    first = edited("a red star", "two blue circles", [1, 2])
    assert first.shape == images.shape and first.min() >= 0 and first.max() <= 1
    assert not torch.equal(first, edited("a red star", "a green square", [1, 2]))
    assert not torch.equal(first, edited("a purple star", "two blue circles", [1, 2]))
    other = edited("a red star", "two blue circles", [1, 3])
    assert torch.equal(first[0], other[0])
    assert torch.equal(first[1], other[1]) is not is_flow(each_backbone)


def test_adapters_take_part_and_switched_off_the_edit_is_the_bases(each_backbone, make_adapters):
    latents = latents_of(each_backbone)

    def edited():
        return edit_latents(each_backbone, latents, ["a red star"], ["two blue circles"], seeds=[0], settings=TWO_STEPS)

    base = edited()
    policy = Policy(each_backbone, make_adapters())
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.3)
    assert not torch.allclose(edited(), base, atol=1e-3)
    with policy.switched_off():
        assert torch.equal(edited(), base)


@pytest.mark.parametrize("prompt", ["empty", "same"])
@torch.no_grad()
def test_guidance_leads_away_from_the_negative_bank_where_the_adapters_say_so(backbone, prompt):
    tokens = SoftTokens(num_tokens=2)
    tokens.attach(backbone)
    for _, parameter in tokens.named_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 3)
    latents, sampler, text = latents_of(backbone), backbone.sampler(2), ["a red star"]
    cond, empty = backbone.encode_text(text), backbone.encode_text([""])
    settings = EditSettings(num_steps=2, strength=0.5, guidance=5.0)
    ordinary = edit_latents(backbone, latents, text, text, seeds=[0], settings=settings)
    with guiding([tokens], "negative", prompt):
        found = edit_latents(backbone, latents, text, text, seeds=[0], settings=settings)

    t = sampler.t[1].expand(1)
    x = invert(lambda x, t: backbone.predict(x, t.expand(1), cond), sampler, latents, start=1)
    with tokens.using("negative"):
        without = backbone.predict(x, t, cond if prompt == "same" else empty)
    expected, _ = sampler.transition(1, x, without + 5.0 * (backbone.predict(x, t, cond) - without), eta=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - ordinary).abs().max() > 1e-3


def test_images_of_another_size_are_a_mistake_of_the_caller(backbone):
    with pytest.raises(ValueError, match="images of"):
        edit(backbone, torch.zeros(1, 3, 8, 8), ["a"], ["b"], seeds=[0])
    with pytest.raises(ValueError, match="as many of each"):
        edit(backbone, torch.zeros(2, 3, backbone.resolution, backbone.resolution), ["a"], ["b"], seeds=[0])

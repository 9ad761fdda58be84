"""SPO's step-aware preference model, with tiny weights in the released file's names, against the network by hand."""

import explicit
import pytest
import torch
import torch.nn.functional as F
from agsm_rl_rewards.preprocessing import MEAN, STD
from agsm_rl_rewards.step_aware_preference import ShortestSide
from tiny_rewards import HEADS

from agsm_rl.errors import UserError
from agsm_rl.training.step_scoring import States, StepAware

PROMPTS = ["a red star", "two blue squares", "a circle"]


def images(count=3, height=40, width=40):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def states(pictures, t):
    return States(pictures, pictures, t, decode=lambda latents: latents)


@pytest.fixture
def weights(tiny_options):
    return torch.load(f"{tiny_options['step_aware_preference']['path']}/sd-v1-5_step-aware_preference_model.bin")


def released_pixels(pictures):
    """The authors' preparation of images in [-1, 1]."""
    resized = F.interpolate(2 * pictures - 1, size=(28, 28), mode="bicubic", align_corners=False)
    pixels = (resized / 2 + 0.5).clamp(0, 1)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_it_judges_the_expected_image_at_its_timestep(make_reward, weights):
    reward, t = make_reward("step_aware_preference"), torch.tensor([0.0, 0.3015, 0.9505])
    assert isinstance(reward, StepAware)
    found = reward.score_states(states(images(), t), PROMPTS)
    features = explicit.step_aware_features(
        weights, released_pixels(images()), torch.tensor([0, 301, 950]), heads=HEADS
    )
    text = reward.network.text_features(PROMPTS, torch.device("cpu"))
    expected = weights["model.logit_scale"].exp() * F.cosine_similarity(features, text)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_timestep_matters_and_a_finished_image_is_at_timestep_0(make_reward):
    reward = make_reward("step_aware_preference", preprocessing="tensor")
    early, finished = (reward.score_states(states(images(), torch.full((3,), t)), PROMPTS) for t in (0.8, 0.0))
    assert (early - finished).abs().min() > 1e-3
    torch.testing.assert_close(reward(images(), PROMPTS), finished)


def test_before_it_was_trained_on_it_is_pick_score(make_reward, tiny_options, tmp_path, weights):
    """The authors begin with gates of 1 and neither shifts nor scales."""
    for name in weights:
        if "adaLN_modulation" in name:
            weights[name].zero_()
    for layer in (0, 1):
        bias = weights[f"model.vision_model.encoder.layers.{layer}.adaLN_modulation.1.bias"]
        bias[64:96] = bias[160:] = 1
    torch.save(weights, tmp_path / "sd-v1-5_step-aware_preference_model.bin")
    reward = make_reward("step_aware_preference", path=str(tmp_path))
    clip = make_reward("pick_score", path=tiny_options["step_aware_preference"]["clip"], preprocessing="tensor")
    pictures = images(3, 28, 28)  # which no preparation resizes
    found = reward.score_states(states(pictures, torch.full((3,), 0.7)), PROMPTS)
    torch.testing.assert_close(found, clip(pictures, PROMPTS), rtol=1e-5, atol=1e-5)


def test_more_states_than_go_at_once_score_as_one_by_one(make_reward):
    reward = make_reward("step_aware_preference")
    pictures, t = images(35), torch.linspace(0, 0.99, 35)
    prompts = [PROMPTS[number % 3] for number in range(35)]
    whole = reward.score_states(states(pictures, t), prompts)
    single = [reward.score_states(states(pictures[n : n + 1], t[n : n + 1]), [prompts[n]]) for n in (0, 33)]
    torch.testing.assert_close(whole[[0, 33]], torch.cat(single), rtol=1e-4, atol=1e-4)


def test_an_oblong_image_loses_its_ends():
    picture = torch.zeros(1, 3, 28, 56)
    picture[..., 14:42] = 1
    found = ShortestSide(28).tensor(picture)
    assert found.shape == (1, 3, 28, 28) and found[0, 0].unique().numel() == 1


def test_a_model_without_a_released_file_is_named(make_reward):
    with pytest.raises(UserError, match="model: 'sd3' is not a diffusion model with a released file"):
        make_reward("step_aware_preference", model="sd3")


def test_it_compares_candidates_in_a_draw(policy, make_step_preferences, make_reward):
    source = make_step_preferences(bind=True, rewards=[(make_reward("step_aware_preference"), 1.0)])
    assert len(source.next(policy)) == 6
    assert source.metrics()["reward_std/step_aware_preference"] > 0

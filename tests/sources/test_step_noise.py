"""Forms of noise of flow models' rollouts, and the window of steps that have any."""

from dataclasses import fields

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.errors import UserError
from agsm_rl.interfaces import RolloutBatch
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.policy_gradient import log_probs_of, rollout_steps
from agsm_rl.policy import Policy
from agsm_rl.sources.trajectories import SDEWindow


@pytest.fixture
def flow_policy(sd3_backbone):
    return Policy(sd3_backbone, {"lora": LoRA(rank=2)})


@pytest.fixture
def draw(flow_policy, make_rollouts):
    """A draw of rollouts on a flow model."""
    return lambda **options: make_rollouts(bind=True, **options).next(flow_policy)


def test_a_flow_model_draws_by_flow_grpo_s_sde_and_others_by_ddim(draw, policy, rollouts):
    batch = draw()
    assert (batch.noise, batch.eta, batch.steps) == ("flow_sde", 0.7, (0, 1, 2))
    batch = rollouts.next(policy)
    assert (batch.noise, batch.eta) == ("ddim", 1.0)


@pytest.mark.parametrize("noise", ["flow_sde", "cps", "ddim"])
def test_fresh_rollouts_have_ratio_one_with_each_form_of_noise(draw, flow_policy, noise):
    batch = draw(noise=noise, guidance=2.0)
    assert batch.noise == noise and len(batch.steps) == 3
    _, metrics = DDPO().loss(flow_policy, batch)
    assert metrics["ratio_deviation"].item() < 1e-5


def test_the_same_draw_differs_with_the_form_and_the_level_of_noise(draw):
    images = [draw(**how).latents for how in ({}, {"noise_level": 0.5}, {"noise": "cps"}, {"noise": "ddim"})]
    for index, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:index])


def test_the_log_probability_of_cps_leaves_the_variance_out(draw, flow_policy):
    batch = draw(noise="cps")
    steps = rollout_steps(flow_policy, flow_policy.live, batch)
    found = log_probs_of(batch, steps)
    for place, (k, (mean, std)) in enumerate(zip(batch.steps, steps, strict=True)):
        squared = (batch.trajectory[:, k + 1] - mean).square().flatten(1).mean(1)
        torch.testing.assert_close(found[:, place], -squared)
        # The noise is of the published size: s = σ'·sin(a·π/2).
        sampler = flow_policy.backbone.sampler(batch.num_steps)
        assert std.item() == pytest.approx(sampler.sigmas[k + 1].item() * torch.tensor(0.35 * torch.pi).sin().item())


def test_outside_its_window_a_draw_follows_the_ode_and_nothing_is_learned(draw, flow_policy):
    batch = draw(sde_window={"size": 1, "range": [1, 2]})
    assert batch.steps == (1,)
    sampler = flow_policy.backbone.sampler(4)
    for k in (0, 2, 3):
        t = sampler.t[k].expand(len(batch))
        prediction = flow_policy.live(batch.trajectory[:, k], t, batch.encode_text(flow_policy.backbone))
        mean, _ = sampler.transition(k, batch.trajectory[:, k], prediction, eta=0.0)
        torch.testing.assert_close(batch.trajectory[:, k + 1], mean, rtol=1e-4, atol=1e-5)
    assert [part.steps for part, _ in DDPO().split(batch)] == [(1,)]


def test_a_window_works_with_ddim_steps_too(policy, make_rollouts):
    batch = make_rollouts(bind=True, sde_window={"size": 2, "range": [0, 2]}).next(policy)
    assert batch.steps == (0, 1) and batch.log_probs[:, 2:].count_nonzero() == 0


def test_images_of_a_prompt_can_begin_alike_and_part_in_the_window(draw):
    batch = draw(same_latent=True, sde_window={"size": 1, "range": [1, 2]}, sample_batch_size=3)
    states = [batch.trajectory[batch.groups == group] for group in batch.groups.unique()]
    assert len(states) > 1 and not torch.equal(states[0][0, 0], states[1][0, 0])
    for own in states:
        for other in own[1:]:
            assert torch.equal(own[0, 0], other[0])
            torch.testing.assert_close(own[0, 1], other[1])
            assert not torch.allclose(own[0, 2], other[2], atol=1e-2)


def test_images_that_begin_alike_need_noise_on_their_way(make_rollouts):
    with pytest.raises(UserError, match="same_latent: true, but with `eta: 0` nothing else is random"):
        make_rollouts(same_latent=True, eta=0.0)


@pytest.mark.parametrize(("name", "value"), [("noise_level", 0.7), ("sde_window", {"size": 2})])
def test_an_option_of_the_noise_is_refused_where_there_is_none(make_rollouts, name, value):
    with pytest.raises(UserError, match=f"{name}: .* has no effect with `eta: 0`"):
        make_rollouts(eta=0.0, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("guidance_bank", "negative"), ("guidance_prompt", "same")])
def test_an_option_of_guidance_is_refused_where_there_is_none(make_rollouts, name, value):
    with pytest.raises(UserError, match=f"{name}: '{value}' has no effect with `guidance: 1`"):
        make_rollouts(guidance=1.0, **{name: value})


def test_a_random_window_reaches_every_place_in_its_range_and_is_fixed_by_the_seed():
    window = SDEWindow({"size": 2, "range": [1, 5]}, 10)
    drawn = [window.at(0, "own", draws) for draws in range(40)]
    assert {place.start for place in drawn} == {1, 2, 3} and {len(place) for place in drawn} == {2}
    assert drawn == [window.at(0, "own", draws) for draws in range(40)]
    assert drawn != [window.at(1, "own", draws) for draws in range(40)]


def test_a_sliding_window_moves_every_so_many_draws_and_begins_again_at_the_end():
    window = SDEWindow({"size": 2, "range": [0, 4], "move": 2}, 10)
    assert [window.at(0, "own", draws).start for draws in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]


def test_the_window_is_of_the_first_half_where_nothing_is_said():
    window = SDEWindow({}, 10)
    assert (window.size, window.first, window.end, window.move) == (2, 0, 5, "random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "sde"}, "noise: 'sde' is not a form of noise"),
        ({"noise_level": 0.0}, "noise_level: got 0.0, but it must be above 0"),
        ({"noise": "cps", "noise_level": 1.2}, r"noise_level: got 1.2, but it must be in \(0, 1\]"),
        ({"sde_window": {"sise": 2}}, "sde_window: 'sise' is not one of its options"),
        ({"sde_window": {"size": 0}}, "sde_window.size: got 0"),
        ({"sde_window": {"size": 3, "range": [0, 2]}}, r"sde_window.range: got \[0, 2\]"),
        ({"sde_window": {"range": [0, 9]}}, r"must lie within \[0, 4\]"),
        ({"sde_window": {"move": "slowly"}}, "sde_window.move: got 'slowly'"),
    ],
    ids=str,
)
def test_options_that_fit_no_model_are_refused_at_once(make_rollouts, options, message):
    with pytest.raises(UserError, match=message):
        make_rollouts(**options)


def test_options_of_another_model_s_noise_are_refused_with_the_remedy(draw, policy, make_rollouts):
    with pytest.raises(UserError, match="eta: 0.7 scales the noise of DDIM's steps.*noise_level"):
        draw(eta=0.7)
    with pytest.raises(UserError, match="noise_level: 0.7 belongs to the SDEs of flow models"):
        make_rollouts(bind=True, noise_level=0.7).next(policy)
    with pytest.raises(UserError, match="'cps' is not a form of noise that this backbone's sampler has"):
        make_rollouts(bind=True, noise="cps").next(policy)


def test_without_noise_no_path_is_kept_on_a_flow_model_either(draw):
    batch = draw(eta=0.0)
    assert not isinstance(batch, RolloutBatch)


def test_a_checkpoint_of_before_there_were_forms_of_noise_resumes_with_ddim(flow_policy, make_rollouts):
    source = make_rollouts(bind=True, noise="ddim", updates=2)
    source.next(flow_policy)
    state = source.state_dict()
    for kept in state["pending"]:
        del kept["noise"]
    resumed = make_rollouts(bind=True, noise="ddim", updates=2)
    resumed.load_state_dict(state)
    expected, batch = source.next(flow_policy), resumed.next(flow_policy)
    for item in fields(batch):
        value = getattr(expected, item.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(batch, item.name), value)
        else:
            assert getattr(batch, item.name) == value
    with torch.no_grad():
        _, metrics = DDPO().loss(flow_policy, batch)
    assert metrics["ratio_deviation"].item() < 1e-5


def test_a_random_window_is_the_same_after_a_resume(flow_policy, make_rollouts):
    how = {"bind": True, "num_steps": 6, "sde_window": {"size": 1, "range": [0, 6]}}
    source = make_rollouts(**how)
    first = [source.next(flow_policy).steps for _ in range(2)]
    resumed = make_rollouts(**how)
    resumed.load_state_dict(source.state_dict())
    assert resumed.next(flow_policy).steps == source.next(flow_policy).steps
    assert all(len(steps) <= 1 for steps in first)

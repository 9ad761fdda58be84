"""Flow-GRPO's step and advantages give the figures of the authors' released functions (golden/flow_grpo.json)."""

import json
from pathlib import Path

import pytest
import torch

from agsm_rl.backbones.flow import flow_sde_step
from agsm_rl.errors import UserError
from agsm_rl.sources.advantages import normalised_by_group
from agsm_rl.training.sampling import gaussian_log_prob

GOLDEN = json.loads((Path(__file__).parent / "golden" / "flow_grpo.json").read_text(encoding="utf-8"))
SDE = GOLDEN["flow_grpo_sde"]
X, PREDICTION = torch.tensor(SDE["x"]), torch.tensor(SDE["prediction"])


def step_of_ours(k: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    now, later, highest = SDE["sigmas"][k], SDE["sigmas"][k + 1], SDE["sigmas"][1]
    return flow_sde_step(X, PREDICTION, now, later, sigma_max=highest, **{"noise_level": SDE["noise_level"]} | options)


@pytest.mark.parametrize("step", SDE["steps"], ids=lambda step: f"step {step['k']}")
def test_each_step_of_the_sde_is_the_authors(step):
    mean, std = step_of_ours(step["k"])
    torch.testing.assert_close(mean, torch.tensor(step["mean"]), rtol=1e-5, atol=1e-5)
    assert float(std) == pytest.approx(step["std_times_sqrt_dt"], rel=1e-5)
    log_prob = gaussian_log_prob(torch.tensor(step["next"]), mean, std)
    torch.testing.assert_close(log_prob, torch.tensor(step["log_prob_mean_over_elements"]), rtol=1e-4, atol=1e-4)


def test_without_noise_the_step_is_the_ode_s():
    mean, std = step_of_ours(3, noise_level=0.0)
    torch.testing.assert_close(mean, X + (SDE["sigmas"][4] - SDE["sigmas"][3]) * PREDICTION)
    assert std == 0


def test_levels_of_single_images_go_in_as_a_tensor_that_broadcasts():
    levels = torch.tensor(SDE["sigmas"]).double()
    both, stds = flow_sde_step(
        X[:1].expand(2, -1, -1, -1),
        PREDICTION[:1].expand(2, -1, -1, -1),
        levels[[0, 5]].view(2, 1, 1, 1),
        levels[[1, 6]].view(2, 1, 1, 1),
        noise_level=0.7,
        sigma_max=SDE["sigmas"][1],
    )
    for row, k in enumerate((0, 5)):
        mean, std = step_of_ours(k)
        torch.testing.assert_close(both[row], mean[0])
        torch.testing.assert_close(stds[row, 0, 0, 0], std)


def test_half_precision_is_computed_in_single():
    mean, std = flow_sde_step(X.bfloat16(), PREDICTION.bfloat16(), 0.5, 0.4, noise_level=0.7, sigma_max=0.9)
    assert mean.dtype == std.dtype == torch.float32


@pytest.mark.parametrize("std", ["group", "global"])
def test_group_advantages_are_the_authors_with_either_standard_deviation(std):
    given = GOLDEN["group_advantages"]
    advantages = normalised_by_group(torch.tensor(given["rewards"]), given["prompts"], std=std)
    torch.testing.assert_close(advantages, torch.tensor(given[f"{std}_std"]), rtol=1e-5, atol=1e-5)


def test_a_group_of_equal_rewards_has_advantage_zero_beside_others_that_differ():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.3])
    advantages = normalised_by_group(rewards, ["a"] * 3 + ["b"] * 3, std="global")
    assert advantages[:3].tolist() == [0, 0, 0] and advantages[3:].count_nonzero() == 3


def test_rollouts_divide_by_either_standard_deviation(make_rollouts, policy):
    given = make_rollouts(bind=True, advantages={"by": "group", "std": "global"})
    batch = given.next(policy)
    expected = normalised_by_group(batch.rewards, batch.prompts, std="global")
    torch.testing.assert_close(batch.advantages, expected)
    assert not torch.allclose(expected, normalised_by_group(batch.rewards, batch.prompts))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("groups", "'groups' is not a way to normalise rewards"),
        ({"by": "group", "of": "global"}, "'of' is not one of its options"),
        ({"by": "group", "std": "all"}, "'all' is not a standard deviation"),
        ({"by": "history", "std": "global"}, "advantages.std: it belongs to `by: group`"),
    ],
    ids=str,
)
def test_other_advantages_are_refused(make_rollouts, given, message):
    with pytest.raises(UserError, match=message):
        make_rollouts(advantages=given)

"""Rollouts: what a draw holds, DDPO's advantages, shares of processes, and exact continuation."""

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.errors import UserError
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.policy import Policy
from agsm_rl.sources.rollouts import Rollouts
from agsm_rl.training.scoring import checked_score


def test_a_draw_holds_the_path_from_noise_to_the_finished_images(policy, rollouts):
    batch = rollouts.next(policy)
    shape = policy.backbone.latent_shape
    assert batch.trajectory.shape == (4, 5, *shape)
    assert batch.log_probs.shape == (4, 4)
    assert torch.equal(batch.latents, batch.trajectory[:, -1])
    assert batch.prompts[0] == batch.prompts[1] != batch.prompts[2]
    assert not torch.equal(batch.trajectory[0, 0], batch.trajectory[1, 0])


def test_updates_share_out_one_draw(policy, make_rollouts):
    source = make_rollouts(updates=2, bind=True)
    first, second = source.next(policy), source.next(policy)
    assert torch.equal(torch.cat([first.rows, second.rows]).sort().values, torch.arange(4))
    assert source.state_dict()["draws"] == 1
    source.next(policy)
    assert source.state_dict()["draws"] == 2


def test_advantages_are_normalised_over_the_draw_while_prompts_are_new(make_rollouts):
    source = make_rollouts(bind=True)
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    found = source._advantages(rewards, ["a", "a", "b", "b"])
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_advantages_are_normalised_by_a_prompt_s_own_history_once_it_has_enough(make_rollouts):
    source = make_rollouts(bind=True, min_history=4)
    source._advantages(torch.tensor([10.0, 12.0]), ["hard", "hard"])
    found = source._advantages(torch.tensor([14.0, 16.0, 0.0]), ["hard", "hard", "new"])
    past = torch.tensor([10.0, 12.0, 14.0, 16.0])
    assert found[0].item() == pytest.approx(float((14 - past.mean()) / past.std(correction=0)), rel=1e-4)
    everything = torch.tensor([14.0, 16.0, 0.0])
    assert found[2].item() == pytest.approx(float((0 - everything.mean()) / everything.std(correction=0)), rel=1e-4)


def test_group_advantages_compare_a_prompts_images_of_this_draw_alone(make_rollouts):
    source = make_rollouts(bind=True, advantages="group", min_history=1)
    source._advantages(torch.tensor([50.0, 70.0]), ["a", "a"])
    rewards = torch.tensor([1.0, 10.0, 3.0, 20.0, 7.0, 7.0])
    found = source._advantages(rewards, ["a", "b", "a", "b", "c", "c"])
    torch.testing.assert_close(found, torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0]), rtol=1e-3, atol=0)
    assert source.state_dict()["histories"] == {}


def test_a_prompt_that_stands_twice_in_a_draw_is_one_group(make_rollouts):
    source = make_rollouts(bind=True, advantages="group")
    found = source._advantages(torch.tensor([0.0, 1.0, 2.0, 3.0]), ["a"] * 4)
    expected = (torch.arange(4.0) - 1.5) / torch.arange(4.0).std(correction=0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_advantages_are_clipped(make_rollouts):
    source = make_rollouts(bind=True, advantage_clip=1.0)
    assert source._advantages(torch.tensor([0.0, 0.0, 0.0, 9.0]), list("abcd")).max() == 1


def test_an_exponential_transform_keeps_the_order_and_bounds_the_good(make_rollouts):
    """λ of DDRL (arXiv 2512.04332) plus 1: at most 1 for the best, clipped for the worst, 0 for equal rewards."""
    form = {"by": "group", "transform": "exponential"}
    rewards, prompts = torch.tensor([0.0, 1.0, 2.0, 5.0, 3.0, 3.0]), ["a"] * 4 + ["b"] * 2
    plain = make_rollouts(bind=True, advantages="group")._advantages(rewards, prompts)
    found = make_rollouts(bind=True, advantages=form)._advantages(rewards, prompts)
    torch.testing.assert_close(found, 1 - torch.exp(-plain))
    assert found.max() < 1 and found[4:].abs().max() == 0
    assert torch.equal(found[:4].argsort(), rewards[:4].argsort())
    clipped = make_rollouts(bind=True, advantages=form, advantage_clip=0.5)._advantages(rewards, prompts)
    assert clipped.min() == -0.5 and clipped.max() == 0.5


def test_equal_rewards_give_no_advantage_and_are_named(make_rollouts):
    source = make_rollouts(bind=True)
    assert source._advantages(torch.ones(4), list("aabb")).abs().max() == 0
    assert source.metrics()["zero_variance"] == 1


@pytest.mark.parametrize("advantages", ["history", "group"])
def test_a_loaded_state_continues_with_the_same_images(policy, make_rollouts, advantages):
    source = make_rollouts(updates=2, bind=True, advantages=advantages)
    source.next(policy)
    state = source.state_dict()
    expected = [source.next(policy), source.next(policy)]
    other = make_rollouts(updates=2, bind=True, advantages=advantages)
    other.load_state_dict(state)
    for batch in expected:
        again = other.next(policy)
        assert torch.equal(batch.trajectory, again.trajectory)
        assert torch.equal(batch.advantages, again.advantages)


def test_sampling_in_smaller_batches_draws_the_same_images(policy, make_rollouts):
    whole = make_rollouts(bind=True).next(policy)
    parts = make_rollouts(bind=True, sample_batch_size=1).next(policy)
    torch.testing.assert_close(whole.trajectory, parts.trajectory, rtol=1e-3, atol=1e-4)


class Fixed:
    """A reward that returns what it was given."""

    name = "fixed"
    range = (0.0, 1.0)
    differentiable = False

    def __init__(self, value):
        self.value = value

    def __call__(self, images, prompts):
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 1), r"returned \(2, 1\), but one score per image is expected, of shape \(2,\)"),
        (torch.tensor([0.0, float("nan")]), "its score is nan for the prompt 'b'"),
        (0.5, "returned float"),
    ],
)
def test_a_reward_that_returns_nonsense_is_named(value, message):
    with pytest.raises(UserError, match=f"reward 'fixed': .*{message}"):
        checked_score(Fixed(value), torch.zeros(2, 3, 4, 4), ["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts"),
        ({"updates": 3}, "updates 3 does not divide"),
        ({"rewards": []}, "rewards"),
        ({"advantages": "grup"}, "'grup' is not a way to normalise rewards.*Did you mean 'group'"),
        ({"advantages": {"by": "group", "transform": "exp"}}, "'exp' is not a transform.*allowed: exponential"),
        ({"advantages": "group", "images_per_prompt": 1}, "images_per_prompt: got 1.*advantages: history"),
        ({"history": 8}, "history: got 8, but min_history is 16"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Rollouts(**({"prompts": "x", "rewards": [(Fixed(0), 1.0)]} | options))


def test_a_prompt_file_without_prompts_is_refused(tmp_path, make_rollouts):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="it has no prompts"):
        make_rollouts(prompts=str(tmp_path / "empty.txt"), bind=True)


def test_a_checkpoint_that_kept_the_path_of_what_the_ema_drew_is_gone_on_with(policy, make_rollouts):
    with_path, without = make_rollouts(updates=2, bind=True), make_rollouts(updates=2, drawn_by="ema", bind=True)
    with_path.next(policy)
    without.load_state_dict(with_path.state_dict())
    assert torch.equal(without.next(policy).latents, with_path.next(policy).latents)


def test_a_flow_s_last_step_which_has_no_noise_is_not_learned_from(sd3_backbone, make_rollouts):
    policy = Policy(sd3_backbone, {"lora": LoRA(rank=2)})
    batch = make_rollouts(bind=True, num_steps=10, keep_graph=True).next(policy)
    assert batch.num_steps == 10 and batch.steps == tuple(range(9))
    parts = DDPO(timestep_fraction=0.2, timesteps="even").split(batch)
    assert [part.steps for part, _ in parts] == [(0,), (8,)]
    for part, _ in parts:
        loss, _ = DDPO().loss(policy, part)
        gradients = torch.autograd.grad(loss, list(policy.parameters().values()), allow_unused=True)
        assert any(found is not None and found.abs().max() > 0 for found in gradients)


def test_a_single_step_of_a_flow_is_refused_by_a_policy_gradient(sd3_backbone, make_rollouts):
    policy = Policy(sd3_backbone, {"lora": LoRA(rank=2)})
    batch = make_rollouts(bind=True, num_steps=1).next(policy)
    with pytest.raises(UserError, match="num_steps to 2 or more"):
        DDPO().split(batch)


def test_a_reward_may_take_the_other_columns_of_its_prompts(tmp_path, policy):
    lines = ['{"prompt": "a star", "count": 1}', '{"prompt": "two stars", "count": 2}']
    (tmp_path / "geneval.jsonl").write_text("\n".join(lines))
    seen = []

    def by_count(images, prompts, metadata):
        seen.extend(zip(prompts, (row["count"] for row in metadata), strict=True))
        return [float(row["count"]) for row in metadata]

    options = {"num_prompts": 2, "images_per_prompt": 2, "num_steps": 2, "guidance": 1.0, "sample_batch_size": 3}
    source = Rollouts(str(tmp_path / "geneval.jsonl"), [(by_count, 1.0)], **options)

    class Shard:
        index, count = 0, 1

        def gather(self, values):
            return values

    source.bind("mine", 0, Shard())
    batch = source.next(policy)
    assert sorted(seen) == [("a star", 1)] * 2 + [("two stars", 2)] * 2
    assert sorted(zip(batch.prompts, batch.rewards.tolist(), strict=True)) == sorted((p, float(n)) for p, n in seen)

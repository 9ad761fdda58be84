"""Views: what one term sees of a batch that several terms share."""

from dataclasses import replace

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PreferenceBatch, RewardedBatch
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.dgpo import DGPO
from agsm_rl.objectives.diffusion_dpo import DiffusionDPO
from agsm_rl.objectives.diffusion_nft import DiffusionNFT
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.sources.views import BestAgainstWorst, BestImages, ImagesAbove, NonzeroAdvantages, VariedGroups
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.randomness import Draw


def rewarded(rewards: list[float], prompts: list[str], advantages: list[float] | None = None) -> RewardedBatch:
    count = len(rewards)
    return RewardedBatch(
        prompts=prompts,
        rows=torch.arange(10, 10 + count),
        latents=torch.arange(count).float()[:, None, None, None].expand(count, 4, 2, 2),
        rewards=torch.tensor(rewards),
        advantages=torch.tensor(rewards if advantages is None else advantages),
    )


def test_the_best_image_of_each_prompt_comes_before_any_second_best():
    batch = rewarded([0.9, 0.8, 0.1, 0.2], ["a", "a", "b", "b"])
    best = BestImages(share=0.5)(batch)
    assert best.prompts == ["a", "b"]
    assert best.latents[:, 0, 0, 0].tolist() == [0, 3]
    assert best.rows.tolist() == [10, 13]


def test_too_few_good_images_leave_no_rows_rather_than_a_broken_group():
    batch = rewarded([0.0, 0.0, 0.0, 1.0], ["a", "a", "b", "b"], advantages=[-1.0, -1.0, -1.0, 1.0])
    assert len(BestImages(share=0.5)(batch)) == 0
    assert len(BestImages(share=0.25)(batch)) == 1


def test_a_share_of_one_nth_is_the_best_of_n():
    batch = rewarded([0.1, 0.9, 0.5, 0.4, 0.2, 0.3], ["a"] * 3 + ["b"] * 3)
    assert BestImages(share=1 / 3, min_advantage=-5.0)(batch).rows.tolist() == [11, 13]


def test_all_images_above_a_threshold_pass_however_many():
    batch = rewarded([0.9, 0.5, 0.1, 0.7], ["a", "a", "b", "b"], advantages=[1.0, -1.0, -0.5, 2.0])
    assert ImagesAbove(reward=0.5)(batch).rows.tolist() == [13, 10, 11]
    assert ImagesAbove(advantage=0.0)(batch).rows.tolist() == [13, 10]
    assert ImagesAbove(reward=0.8, advantage=0.0)(batch).prompts == ["a"]
    assert ImagesAbove(reward=0.5, multiple_of=2)(batch).rows.tolist() == [13, 10]
    assert len(ImagesAbove(reward=1.0)(batch)) == 0
    with pytest.raises(UserError, match="neither `reward` nor `advantage`"):
        ImagesAbove()


def test_a_prompt_whose_images_are_all_worth_the_same_is_left_out_whole():
    batch = rewarded([1.0, 1.0, 0.0, 1.0, 1.0, 0.0], ["a", "a", "b", "b", "b", "a"])
    assert len(VariedGroups()(batch)) == 6
    batch = replace(batch, groups=torch.tensor([0, 0, 1, 1, 1, 2]))  # the last one is of another draw of its prompt
    kept = VariedGroups()(batch)
    assert kept.rows.tolist() == [12, 13, 14] and kept.groups.tolist() == [1, 1, 1]
    assert len(VariedGroups()(rewarded([1.0, 1.0], ["a", "a"]))) == 0


def test_objectives_on_finished_images_learn_from_the_prompts_that_are_left(make_policy, make_rollouts):
    """The same gradient as from these images alone; a step without any is sat out."""
    policy = make_policy()
    batch = make_rollouts(bind=True).next(policy)
    batch.rewards.copy_(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    kept = VariedGroups()(batch)
    assert kept.prompts == batch.prompts[2:]
    for objective in (DGPO(), DiffusionNFT()):
        loss, _ = objective.loss(policy, kept)
        torch.testing.assert_close(loss, objective.loss(policy, batch.select(torch.tensor([2, 3])))[0])
    with pytest.raises(UserError, match="dgpo: view: a step has at most one image per prompt"):
        Term(DiffusionNFT(), make_rollouts(updates=2), name="dgpo", view=VariedGroups())


def test_the_best_is_set_against_the_worst_of_its_prompt_and_ties_are_left_out():
    batch = rewarded([0.0, 1.0, 0.5, 1.0, 1.0], ["a", "a", "a", "b", "b"])
    pairs = BestAgainstWorst()(batch)
    assert isinstance(pairs, PreferenceBatch)
    assert pairs.prompts == ["a"]
    assert (pairs.chosen[0, 0, 0, 0], pairs.rejected[0, 0, 0, 0]) == (1, 0)


def test_a_policy_gradient_leaves_out_the_rollouts_whose_advantage_is_zero(make_policy, make_rollouts):
    """The clipped loss of what is left, as if the others had not been drawn."""
    policy = make_policy()
    batch = make_rollouts(bind=True).next(policy)
    batch.advantages.copy_(torch.tensor([1.0, 0.0, -0.5, 0.0]))
    kept = NonzeroAdvantages()(batch)
    assert kept.advantages.tolist() == [1.0, -0.5]
    assert kept.prompts == [batch.prompts[0], batch.prompts[2]]
    part, _ = FlowGRPO().split(kept)[0]
    loss, metrics = FlowGRPO().loss(policy, part)
    assert loss.item() - 0.04 * metrics["kl"].item() == pytest.approx(-0.25, abs=1e-4)


def test_a_draw_without_any_advantage_is_skipped_and_so_is_its_kl(make_policy, make_rollouts):
    source = make_rollouts(rewards=[(Fixed(), 1.0)], advantages="group")
    trainer = Trainer(make_policy(), [Term(FlowGRPO(), source, name="grpo", view=NonzeroAdvantages())], steps=1)
    metrics = trainer.run_step()
    assert metrics["grpo/rows"] == 0
    assert "grpo/kl" not in metrics


def test_agsm_learns_from_the_best_of_the_rollouts_that_ddpo_learns_from(make_policy, make_rollouts):
    policy, source = make_policy(), make_rollouts(images_per_prompt=4)
    terms = [
        Term(DDPO(), source, name="ddpo", source_name="own"),
        Term(AGSM(group_size=2), source, name="agsm", source_name="own", view=BestImages(share=0.25)),
    ]
    metrics = Trainer(policy, terms, steps=1).run_step()
    assert metrics["agsm/rows"] == 2
    assert metrics["agsm/grad_norm"] > 0
    assert "cosine/ddpo/agsm" in metrics


def test_dpo_learns_online_from_the_best_of_each_prompt_s_own_images_against_the_worst(make_policy, make_rollouts):
    policy, source = make_policy(), make_rollouts(images_per_prompt=3, eta=0.0)
    term = Term(DiffusionDPO(beta=100.0), source, name="dpo", source_name="own", view=BestAgainstWorst())
    trainer = Trainer(policy, [term], steps=6, learning_rate=1e-4)
    history = [trainer.run_step() for _ in range(6)]
    assert all(metrics["dpo/rows"] == 2 for metrics in history)
    assert all(metrics["dpo/grad_norm"] > 0 for metrics in history)


def test_learning_from_one_draw_turns_the_policy_to_its_best_images(make_policy, make_rollouts):
    """Online DPO in small: the margin of the same preferences, at the same noise, grows step by step."""
    policy = make_policy()
    pairs = BestAgainstWorst()(make_rollouts(images_per_prompt=3, eta=0.0, bind=True).next(policy))

    class Kept:
        """A source that gives the same preferences again and again."""

        gives = PreferenceBatch

        def bind(self, name, seed, shard):
            pass

        def next(self, policy):
            return pairs

        def metrics(self):
            return {}

        def state_dict(self):
            return {}

    objective = DiffusionDPO(beta=100.0)

    def margin():
        policy.draw = Draw(7, "look")
        with torch.no_grad():
            return objective.loss(policy, pairs)[1]["margin"].item()

    before = margin()
    Trainer(policy, [Term(objective, Kept(), name="dpo")], steps=20, learning_rate=1e-3).train()
    assert margin() > before


def test_a_term_whose_view_leaves_no_rows_is_passed_over(make_policy, make_rollouts):
    policy, source = make_policy(), make_rollouts()
    view = BestImages(share=0.5, min_advantage=100.0)
    trainer = Trainer(policy, [Term(AGSM(group_size=2), source, name="agsm", view=view)], steps=1)
    before = {name: value.clone() for name, value in policy.parameters().items()}
    metrics = trainer.run_step()
    assert metrics["agsm/rows"] == 0
    assert "agsm/loss" not in metrics
    assert "agsm/reward" in metrics
    assert all(torch.equal(before[name], value) for name, value in policy.parameters().items())


def test_a_view_that_could_never_see_anything_is_refused(make_rollouts):
    alone = make_rollouts(images_per_prompt=2, updates=2)
    with pytest.raises(UserError, match="dpo: view: a step has at most one image per prompt.*at least 4"):
        Term(DiffusionDPO(), alone, name="dpo", view=BestAgainstWorst())
    with pytest.raises(UserError, match="agsm: view: share: 0.1 of 2 images rounds to 0"):
        Term(AGSM(group_size=2), alone, name="agsm", view=BestImages(share=0.1))


def test_images_that_are_all_worth_the_same_are_told_also_where_no_pair_is_left(make_policy, make_rollouts):
    source = make_rollouts(rewards=[(Fixed(), 1.0)])
    trainer = Trainer(make_policy(), [Term(DiffusionDPO(), source, name="dpo", view=BestAgainstWorst())], steps=1)
    assert trainer.run_step()["dpo/rows"] == 0
    assert [event.watch for event in trainer.watch.events] == ["constant_reward"]


class Fixed:
    """Gives every image the same."""

    name, range, differentiable = "fixed", (0.0, 1.0), False

    def __call__(self, images, prompts):
        return torch.full((len(prompts),), 0.5)


@pytest.mark.parametrize("how", [{"eta": 0.0}, {"drawn_by": "ema"}], ids=["without noise", "by the EMA"])
def test_rollouts_that_no_policy_gradient_can_learn_from_keep_no_path_and_ddpo_refuses_them(
    make_policy, make_rollouts, how
):
    source = make_rollouts(bind=True, **how)
    batch = source.next(make_policy())
    assert type(batch) is RewardedBatch
    with pytest.raises(UserError, match="learns from a RolloutBatch, but its source gives a RewardedBatch.*drawn_by"):
        Term(DDPO(), source, name="ddpo")


def test_rollouts_without_noise_end_where_the_path_of_noiseless_steps_ends(make_policy, make_rollouts):
    from agsm_rl.sources.trajectories import StepNoise, draw_trajectories
    from agsm_rl.training.randomness import Draw

    how = {"num_steps": 3, "guidance": 1.0, "noise": StepNoise(level=0.0)}
    policy, rows = make_policy(), torch.arange(2)
    path, _ = draw_trajectories(policy, ["a", "b"], Draw(), rows, **how)
    end, _ = draw_trajectories(policy, ["a", "b"], Draw(), rows, keep_path=False, **how)
    assert torch.equal(path[:, -1:], end)


def test_rollouts_are_drawn_by_the_ema_when_asked(make_policy, make_rollouts):
    def drawn(moved: bool, by: str) -> torch.Tensor:
        policy = make_policy()
        if moved:
            for parameter in policy.parameters().values():
                parameter.data += 0.3
        return make_rollouts(bind=True, drawn_by=by).next(policy).latents

    assert torch.equal(drawn(True, "ema"), drawn(False, "live"))
    assert not torch.equal(drawn(True, "live"), drawn(False, "live"))


def test_pending_rollouts_without_a_path_survive_a_checkpoint(make_policy, make_rollouts):
    policy, source = make_policy(), make_rollouts(eta=0.0, updates=2, bind=True)
    source.next(policy)
    state = source.state_dict()
    expected = source.next(policy)
    again = make_rollouts(eta=0.0, updates=2, bind=True)
    again.load_state_dict(state)
    assert torch.equal(again.next(policy).latents, expected.latents)


RECIPE = {
    "steps": 1,
    "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
    "adapters": {"lora": {"use": "lora", "rank": 2}},
    "sources": {"own": {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"shapes": 1.0}}},
}


def test_a_view_in_a_recipe_is_completed_and_its_rows_must_suit_the_objective():
    term = {"use": "agsm", "source": "own", "view": {"use": "best_images"}}
    recipe = Recipe.from_data(RECIPE | {"objectives": [term]})
    assert recipe.objectives[0].view.options == {"share": 0.25, "min_advantage": 0.0}
    term = {"use": "agsm", "source": "own", "view": {"use": "best_images", "share": 0.04}}
    with pytest.raises(UserError, match="batch_size 3 is not a multiple of group_size 4"):
        Recipe.from_data(RECIPE | {"objectives": [term]})
    term = {"use": "diffusion_dpo", "source": "own", "view": {"use": "best_against_worst"}}
    own = {"own": RECIPE["sources"]["own"] | {"images_per_prompt": 1}}
    with pytest.raises(UserError, match=r"objectives\[0\]\.view: a step has at most one image per prompt"):
        Recipe.from_data(RECIPE | {"sources": own, "objectives": [term]})


def test_a_view_of_pairs_is_refused_with_what_would_work():
    pairs = {"use": "pairs", "dataset": "builtin:shapes"}
    term = {"use": "agsm", "source": pairs, "view": {"use": "best_images"}}
    with pytest.raises(UserError, match=r"objectives\[0\]\.view: 'best_images' learns from a RewardedBatch.*rollouts"):
        Recipe.from_data(RECIPE | {"objectives": [term]})


def test_an_unknown_view_is_an_error_with_its_place():
    term = {"use": "agsm", "source": "own", "view": {"use": "best_image"}}
    with pytest.raises(UserError, match=r"objectives\[0\]\.view\.use: 'best_image' is not a view.*best_images"):
        Recipe.from_data(RECIPE | {"objectives": [term]})


def test_a_recipe_whose_rollouts_lack_what_an_objective_compares_is_refused():
    with pytest.raises(UserError, match=r"objectives\[0\] on sources.own: .* add `keep_means: true`"):
        Recipe.from_data(RECIPE | {"objectives": [{"use": "flow_dppo", "source": "own"}]})
    own = {"own": RECIPE["sources"]["own"] | {"images_per_prompt": 1}}
    with pytest.raises(UserError, match=r"objectives\[0\] on sources.own: a step has at most one image per prompt"):
        Recipe.from_data(RECIPE | {"sources": own, "objectives": [{"use": "dgpo", "source": "own"}]})

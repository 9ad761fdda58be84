"""Step preferences: candidates of one state, the best against the worst, dropped ties, shares, exact continuation."""

from dataclasses import fields, replace

import pytest
import torch
from agsm_rl_rewards.brightness import Brightness

from agsm_rl.adapters.lora import LoRA
from agsm_rl.errors import UserError
from agsm_rl.objectives.spo import SPO
from agsm_rl.policy import Policy
from agsm_rl.sources.step_preferences import StepPreferences
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.mixing import x0_estimate
from agsm_rl.training.scoring import WeightedReward
from agsm_rl.training.step_scoring import StepAware


class Judge:
    """A reward of states that keeps what it was shown; it prefers states of larger values."""

    name, range, differentiable, elsewhere = "judge", (-10.0, 10.0), False, False

    def __init__(self, scale=1.0):
        self.scale, self.seen = scale, []

    def __call__(self, images, prompts):
        raise AssertionError("called as a reward of finished images")

    def score_states(self, states, prompts):
        self.seen.append((states, list(prompts)))
        return self.scale * states.x_t.mean(dim=(1, 2, 3))


@pytest.fixture
def flow_policy(sd3_backbone):
    return Policy(sd3_backbone, {"lora": LoRA(rank=2)})


def test_both_states_of_a_pair_come_from_one_state_in_one_step(policy, make_step_preferences):
    batch = make_step_preferences(bind=True).next(policy)
    assert batch.chosen.shape == (6, *policy.backbone.latent_shape)
    assert sorted(batch.step.tolist()) == [1, 1, 2, 2, 3, 3] and batch.weight.tolist() == [1.0] * 6
    assert torch.equal(batch.chosen_from, batch.rejected_from)
    assert not torch.equal(batch.chosen, batch.rejected)
    for prompt in set(batch.prompts):
        rows = [row for row in range(6) if batch.prompts[row] == prompt]
        rows.sort(key=lambda row: batch.step[row])
        for earlier, later in zip(rows, rows[1:], strict=False):
            # A random candidate goes on: here often neither the best nor the worst.
            assert not torch.equal(batch.chosen_from[earlier], batch.chosen_from[later])


def test_the_best_of_all_candidates_is_paired_with_the_worst_and_a_random_one_goes_on(policy, make_step_preferences):
    judge = Judge()
    batch = make_step_preferences(bind=True, rewards=[(judge, 1.0)], candidates=5, num_prompts=1).next(policy)
    assert len(judge.seen) == 3
    for place, (states, prompts) in enumerate(judge.seen):
        assert len(prompts) == 5 and states.t.unique().numel() == 1
        size = states.x_t.mean(dim=(1, 2, 3))
        row = int((batch.step == place + 1).nonzero())
        assert torch.equal(batch.chosen[row], states.x_t[size.argmax()])
        assert torch.equal(batch.rejected[row], states.x_t[size.argmin()])
        if place < 2:
            following = batch.chosen_from[int((batch.step == place + 2).nonzero())]
            assert sum(torch.equal(following, state) for state in states.x_t) == 1


def test_the_candidate_that_goes_on_does_not_depend_on_its_score(policy, make_step_preferences):
    best, worst = (
        make_step_preferences(bind=True, rewards=[(Judge(scale), 1.0)]).next(policy) for scale in (1.0, -1.0)
    )
    order = [batch.rows.argsort() for batch in (best, worst)]
    assert torch.equal(best.chosen_from[order[0]], worst.chosen_from[order[1]])
    assert torch.equal(best.chosen[order[0]], worst.rejected[order[1]])


def test_a_reward_sees_the_state_its_level_and_the_image_that_the_model_expects(policy, make_step_preferences):
    judge = Judge()
    make_step_preferences(bind=True, rewards=[(judge, 1.0)]).next(policy)
    backbone = policy.backbone
    sampler = backbone.sampler(4)
    for place, (states, prompts) in enumerate(judge.seen):
        k = place + 2
        if k == 4:
            assert torch.equal(states.x0, states.x_t) and states.t.count_nonzero() == 0
            continue
        assert torch.equal(states.t, sampler.t[k].expand(len(states.x_t)))
        noise = policy.live(states.x_t, states.t, backbone.encode_text(prompts)).detach()
        step = sampler.scheduler.step(noise, sampler.timesteps[k], states.x_t)
        torch.testing.assert_close(states.x0, step.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states.images, backbone.decode(states.x0))


def test_any_reward_of_images_judges_the_expected_image(policy, make_step_preferences):
    class Bright(Judge):
        def score_states(self, states, prompts):
            return Brightness()(states.images, prompts)

    assert isinstance(Bright(), StepAware) and not isinstance(Brightness(), StepAware)
    plain = make_step_preferences(bind=True).next(policy)
    aware = make_step_preferences(bind=True, rewards=[(Bright(), 1.0)]).next(policy)
    assert torch.equal(plain.chosen, aware.chosen) and torch.equal(plain.rejected, aware.rejected)


def test_the_expected_image_of_the_true_target_is_the_image(each_backbone):
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, *each_backbone.latent_shape, generator=draw) for _ in range(2))
    t = torch.tensor([0.05, 0.5, 0.9])
    found = x0_estimate(each_backbone, each_backbone.add_noise(x0, noise, t), each_backbone.target(x0, noise, t), t)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


def test_a_flow_model_takes_its_sde_and_judges_the_last_noisy_step_by_the_estimate(flow_policy, make_step_preferences):
    judge = Judge()
    batch = make_step_preferences(bind=True, rewards=[(judge, 1.0)]).next(flow_policy)
    assert (batch.noise, batch.eta) == ("flow_sde", 0.7) and sorted(batch.step.unique().tolist()) == [1, 2]
    assert judge.seen[-1][0].t.max() > 0
    cps = make_step_preferences(bind=True, noise="cps", noise_level=0.5).next(flow_policy)
    assert (cps.noise, cps.eta) == ("cps", 0.5)


def test_candidates_that_go_several_steps_are_compared_at_the_end_and_every_step_is_paired(
    policy, make_step_preferences
):
    judge = Judge()
    batch = make_step_preferences(
        bind=True, rewards=[(judge, 1.0)], num_prompts=1, num_steps=6, first_step=1, steps_per_choice=2, candidates=2
    ).next(policy)
    # Steps 1 and 2, 3 and 4, and 5 alone.
    assert len(judge.seen) == 3 and not batch.same_start and sorted(batch.step.tolist()) == [1, 2, 3, 4, 5]
    row = {int(step): place for place, step in enumerate(batch.step)}
    for first in (1, 3):
        assert torch.equal(batch.chosen_from[row[first]], batch.rejected_from[row[first]])
        assert torch.equal(batch.chosen_from[row[first + 1]], batch.chosen[row[first]])
        assert torch.equal(batch.rejected_from[row[first + 1]], batch.rejected[row[first]])
    loss, metrics = SPO().loss(policy, batch)
    assert torch.isfinite(loss) and metrics["chosen_ratio"] > 0


def test_pairs_closer_than_the_threshold_are_dropped_and_the_rest_counts_in_full(policy, make_step_preferences):
    judge = Judge(100.0)
    source = make_step_preferences(bind=True, rewards=[(judge, 1.0)], num_prompts=3, threshold=0.9)
    batch = source.next(policy)
    gaps = [states.x_t.mean(dim=(1, 2, 3)).mul(100).unflatten(0, (3, -1)).aminmax(dim=0) for states, _ in judge.seen]
    kept = sum(int((torch.tanh((gap.max - gap.min) / 2) > 0.9).sum()) for gap in gaps)
    assert len(batch) == kept and 0 < kept <= 9
    assert source.metrics()["pairs_kept"] == pytest.approx(kept / 9)
    assert batch.weight.tolist() == [1.0] * kept


def test_a_draw_without_a_pair_gives_no_rows_and_changes_nothing(make_policy, make_step_preferences):
    class Constant(Brightness):
        def __call__(self, images, prompts):
            return torch.zeros(len(prompts))

    policy = make_policy()
    source = make_step_preferences(rewards=[(Constant(), 1.0)])
    trainer = Trainer(policy, [Term(SPO(), source, name="spo")], steps=1)
    before = {name: value.detach().clone() for name, value in policy.parameters().items()}
    metrics = trainer.run_step()
    assert metrics["spo/pairs_kept"] == 0 and "spo/loss" not in metrics
    assert all(torch.equal(value, before[name]) for name, value in policy.parameters().items())


def test_updates_share_out_each_image_s_steps(policy, make_step_preferences):
    source = make_step_preferences(bind=True, updates=3)
    batches = [source.next(policy) for _ in range(3)]
    assert [len(batch) for batch in batches] == [2, 2, 2] and source.state_dict()["draws"] == 1
    assert torch.cat([batch.rows for batch in batches]).sort().values.tolist() == list(range(6))
    assert all(len(set(batch.prompts)) == 2 for batch in batches)
    whole = make_step_preferences(bind=True).next(policy)
    for batch in batches:
        for row, number in enumerate(batch.rows.tolist()):
            assert torch.equal(batch.chosen[row], whole.chosen[(whole.rows == number).nonzero().item()])


def test_a_loaded_state_continues_with_the_same_pairs(policy, make_step_preferences):
    source = make_step_preferences(bind=True, updates=2)
    source.next(policy)
    state = source.state_dict()
    expected = [source.next(policy), source.next(policy)]
    other = make_step_preferences(bind=True, updates=2)
    other.load_state_dict(state)
    for batch in expected:
        again = other.next(policy)
        for item in fields(batch):
            value, found = getattr(batch, item.name), getattr(again, item.name)
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found


def test_drawing_fewer_at_once_gives_the_same_pairs(policy, make_step_preferences):
    whole = make_step_preferences(bind=True).next(policy)
    parts = make_step_preferences(bind=True, sample_batch_size=1).next(policy)
    torch.testing.assert_close(whole.chosen, parts.chosen, rtol=1e-3, atol=1e-4)
    assert torch.equal(whole.rows, parts.rows)


class OneOfTwo:
    """A process that knows what both gather: it is asked in the same order, and adds its own part."""

    count = 2

    def __init__(self, index, gathered):
        self.index, self.gathered, self.calls = index, gathered, 0

    def gather(self, values):
        """All processes' rows; the first process is run twice, once to leave its part here."""
        self.gathered.setdefault(self.calls, {})[self.index] = values
        parts = self.gathered[self.calls]
        self.calls += 1
        return torch.cat([parts.get(index, values) for index in range(2)])


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_two_processes_learn_from_the_pairs_of_one(policy, make_step_preferences, threshold):
    options = {"rewards": [(Judge(100.0), 1.0)], "updates": 2, "threshold": threshold}

    def gradient(batches):
        total = 0
        for batch in batches:
            loss, _ = SPO().loss(policy, batch)
            found = torch.autograd.grad(loss, list(policy.parameters().values()), allow_unused=True)
            total = total + torch.cat([value.flatten() for value in found if value is not None])
        return total / len(batches)

    alone = make_step_preferences(bind=True, **options)
    gathered = {}
    for index in (0, 1):  # to know what each gathers
        make_step_preferences(bind=True, shard=OneOfTwo(index, gathered), **options).next(policy)
    both = [make_step_preferences(bind=True, shard=OneOfTwo(index, gathered), **options) for index in (0, 1)]
    fillers = 0
    for _ in range(2):
        whole, shares = alone.next(policy), [source.next(policy) for source in both]
        counted = torch.cat([share.rows[share.weight > 0] for share in shares])
        assert torch.equal(counted.sort().values, whole.rows.sort().values)
        assert {bool(len(batch)) for batch in (whole, *shares)} == {bool(len(whole))}
        if len(whole):
            torch.testing.assert_close(gradient(shares), gradient([whole]), rtol=1e-3, atol=1e-6)
            fillers += sum(int((share.weight == 0).sum()) for share in shares)
    assert bool(fillers) == bool(threshold)  # a process without a pair takes part all the same
    assert both[0].metrics() == pytest.approx(alone.metrics(), rel=1e-4)


def test_a_checkpoint_between_the_updates_of_two_processes_is_refused(policy, make_step_preferences):
    source = make_step_preferences(bind=True, updates=2)
    source.next(policy)
    with pytest.raises(UserError, match="between the 2 `updates` of a draw"):
        make_step_preferences(bind=True, updates=2, shard=OneOfTwo(0, {})).load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts: got 0"),
        ({"candidates": 1}, "candidates: got 1, but a pair needs 2"),
        ({"first_step": 4}, "first_step: got 4.*one of the 4 steps"),
        ({"steps_per_choice": 0}, "steps_per_choice: got 0"),
        ({"threshold": 1.0}, r"threshold: got 1.0, but it must lie in \[0, 1\)"),
        ({"eta": 0.0}, "without noise all candidates are the same"),
        ({"noise": "sde"}, "noise: 'sde' is not a form of noise"),
        ({"negative_prompt": "blurred"}, "negative_prompt: 'blurred' has no effect with `guidance: 1`"),
        ({"rewards": [WeightedReward(Brightness(), 1.0, "mine", "z_score")]}, "rewards.mine: `normalise`"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else None,
)
def test_options_that_cannot_work_are_refused(make_step_preferences, options, message):
    with pytest.raises(UserError, match=message):
        make_step_preferences(**options)


def test_guidance_steers_away_from_the_negative_prompt_in_the_draw_and_in_the_loss(policy, make_step_preferences):
    plain, negative = (
        make_step_preferences(bind=True, guidance=3.0, negative_prompt=text).next(policy) for text in ("", "a circle")
    )
    assert not torch.equal(plain.chosen, negative.chosen) and negative.negative_prompt == "a circle"
    loss, _ = SPO().loss(policy, negative)
    other, _ = SPO().loss(policy, replace(negative, negative_prompt=""))
    assert loss != other


def test_a_batch_carries_the_columns_of_its_prompts(policy, make_step_preferences, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red star", "n": 1}\n{"prompt": "a blue circle", "n": 2}\n')
    batch = make_step_preferences(bind=True, prompts=str(tmp_path / "p.jsonl")).next(policy)
    assert {(prompt, row["n"]) for prompt, row in zip(batch.prompts, batch.metadata, strict=True)} == {
        ("a red star", 1),
        ("a blue circle", 2),
    }


def test_more_updates_than_steps_are_refused_with_the_number_of_steps(policy, make_step_preferences):
    with pytest.raises(UserError, match="updates: 4, but each image has only 3 steps"):
        make_step_preferences(bind=True, updates=4).next(policy)


@pytest.mark.parametrize(
    ("scores", "message"), [(torch.zeros(2), r"reward 'judge': it returned \(2,\)"), (float("nan"), "its score is nan")]
)
def test_a_judge_of_states_that_returns_nonsense_is_named(policy, make_step_preferences, scores, message):
    class Broken(Judge):
        def score_states(self, states, prompts):
            return scores if isinstance(scores, torch.Tensor) else torch.full((len(prompts),), scores)

    with pytest.raises(UserError, match=message):
        make_step_preferences(bind=True, rewards=[(Broken(), 1.0)]).next(policy)


def test_the_defaults_are_the_released_ones_for_sd15():
    source = StepPreferences("x", [(Brightness(), 1.0)])
    assert (source.num_steps, source.first_step, source.candidates, source.threshold) == (20, 4, 4, 0.3)
    assert (source.guidance, source.eta, source.steps_per_choice) == (5.0, 1.0, 1)

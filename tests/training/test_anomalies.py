"""Numbers that go wrong: found, named, and handled as the recipe says, with everything left consistent."""

import math
from dataclasses import dataclass

import pytest
import torch

from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.score_matching import ScoreMatching
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.anomalies import AnomalyWatch, WentWrong


@dataclass
class Broken:
    """An objective whose loss and gradient are `value` in the given steps (from 1), and harmless in others."""

    value: float
    steps: tuple[int, ...]
    calls: int = 0
    consumes = PairBatch

    def check(self, batch_size):
        pass

    def split(self, batch):
        return [(batch, 1.0)]

    def loss(self, policy, batch):
        self.calls += 1
        factor = self.value if self.calls in self.steps else 0.1
        return sum((p**2).sum() for p in policy.parameters().values()) * factor, {}


@dataclass
class OnlyLora:
    """An objective that never reaches the tokens."""

    consumes = PairBatch

    def check(self, batch_size):
        pass

    def split(self, batch):
        return [(batch, 1.0)]

    def loss(self, policy, batch):
        return sum((p**2).sum() + p.sum() for p in policy.parameters(["lora"]).values()), {}


def state_of(trainer):
    """What a step changes, as tensors by name."""
    state = trainer.state_dict()
    found = {f"{which}.{name}": value for which in ("live", "ema") for name, value in state["policy"][which].items()}
    for index, one in state["optimizer"]["state"].items():
        found |= {f"optimizer.{index}.{key}": value for key, value in one.items()}
    return {name: value.clone() for name, value in found.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_leaves_parameters_optimiser_and_shadow_and_moves_the_source_on(make_policy, make_pairs, value):
    term = Term(Broken(value, (2,)), make_pairs(), name="broken")
    trainer = Trainer(make_policy(), [term], steps=3, watch=AnomalyWatch(non_finite="skip"))
    trainer.run_step()
    before, position = state_of(trainer), term.source.state_dict()
    metrics = trainer.run_step()
    assert same(before, state_of(trainer))
    assert term.source.state_dict() != position
    assert (trainer.step, metrics["broken/skipped"], metrics["loss"]) == (2, 1.0, 0.0)
    (event,) = trainer.watch.events
    assert (event.step, event.watch, event.subject, event.action) == (2, "non_finite", "broken", "skip")
    assert "step 2: objective 'broken': its loss is" in event.message
    trainer.run_step()
    assert not same(before, state_of(trainer))


def test_a_skipped_term_leaves_the_others_as_if_it_were_not_there(make_policy, make_pairs):
    def run(*terms):
        trainer = Trainer(make_policy(), [*terms], steps=2, watch=AnomalyWatch(non_finite="skip"))
        trainer.train()
        return state_of(trainer)

    alone = run(Term(ScoreMatching(), make_pairs(), name="matching"))
    stacked = run(
        Term(Broken(math.nan, (1, 2)), make_pairs(), name="broken"),
        Term(ScoreMatching(), make_pairs(), name="matching"),
    )
    assert same(alone, stacked)


def test_skipping_ends_after_so_many_in_a_row_and_a_good_step_begins_the_count_anew(make_policy, make_pairs):
    def trainer(*steps):
        term = Term(Broken(math.nan, steps), make_pairs(), name="broken")
        return Trainer(make_policy(), [term], steps=6, watch=AnomalyWatch(non_finite="skip", non_finite_skips=2))

    trainer(1, 2, 4, 5).train()
    with pytest.raises(WentWrong, match=r"step 4: objective 'broken'.*after 2 skipped steps in a row") as told:
        trainer(2, 3, 4).train()
    assert told.value.event.action == "stop"


def test_the_count_of_skipped_steps_is_continued(make_policy, make_pairs):
    def trainer():
        term = Term(Broken(math.nan, (1, 2, 3, 4)), make_pairs(), name="broken")
        return Trainer(make_policy(), [term], steps=6, watch=AnomalyWatch(non_finite="skip", non_finite_skips=2))

    begun, resumed = trainer(), trainer()
    begun.run_step()
    begun.run_step()
    resumed.load_state_dict(begun.state_dict())
    with pytest.raises(WentWrong, match="step 3"):
        resumed.run_step()


def test_an_adapter_whose_gradient_is_exactly_zero_is_named_once(make_policy, make_pairs):
    trainer = Trainer(
        make_policy(), [Term(OnlyLora(), make_pairs(), name="x")], steps=5, watch=AnomalyWatch(zero_gradient_steps=3)
    )
    told = []
    for _ in range(5):
        trainer.run_step()
        told += trainer.watch.events
    (event,) = told
    assert (event.step, event.watch, event.subject, event.value) == (3, "zero_gradient", "adapter 'tokens'", 3)


def test_an_adapter_that_no_term_trains_is_no_mistake(make_policy, make_pairs):
    term = Term(OnlyLora(), make_pairs(), name="x", trains=["lora"])
    trainer = Trainer(make_policy(), [term], steps=2, watch=AnomalyWatch(zero_gradient="stop", zero_gradient_steps=1))
    trainer.train()
    assert trainer.step == 2 and not trainer.watch.events


def figures(**changes):
    return {"loss": 0.1, "grad_norm": 0.1, "x0_norm": 1.0, "reward/a": 3.0, "reward_std/a": 0.5} | changes


@pytest.mark.parametrize(
    ("watch", "wrong", "message"),
    [
        ("x0_norm", {"x0_norm": 4.5}, "own: the images drawn grow without bound.*4.5, in the first draw it was 1"),
        ("zero_variance", {"zero_variance": 1.0}, "own: the images of a draw are all worth the same"),
        ("constant_reward", {"reward_std/a": 0.0}, "own: reward 'a' is 3 for all images of a draw"),
    ],
)
def test_what_a_draw_tells_is_warned_of_skipped_stopped_or_ignored(watch, wrong, message):
    def looked(action):
        found = AnomalyWatch(**{watch: action})
        assert found.term_passes(1, "own", figures())
        found.begin_step()
        return found.term_passes(2, "own", figures(**wrong)), [(event.watch, event.step) for event in found.events]

    assert looked("warn") == (True, [(watch, 2)])
    assert looked("skip") == (False, [(watch, 2)])
    assert looked("ignore") == (True, [])
    with pytest.raises(WentWrong, match=f"step 2: {message}"):
        looked("stop")


def test_a_warning_is_given_when_something_begins_and_not_while_it_lasts_also_after_a_resume():
    watch, told = AnomalyWatch(), []
    for step, spread in enumerate([0.0, 0.0, 0.5, 0.0, 0.0], start=1):
        watch.begin_step()
        watch.term_passes(step, "own", figures(**{"reward_std/a": spread}))
        told += [event.step for event in watch.events]
        state = watch.state_dict()
        watch = AnomalyWatch()
        watch.load_state_dict(state)
    assert told == [1, 4]


def test_a_draw_whose_only_reward_is_constant_is_warned_of_once_by_the_reward_s_name():
    watch = AnomalyWatch()
    assert watch.term_passes(1, "own", figures(**{"reward_std/a": 0.0, "zero_variance": 1.0}))
    assert [event.watch for event in watch.events] == ["constant_reward"]


def test_rollouts_that_are_worth_the_same_are_left_out_where_the_recipe_says_so(make_policy, make_rollouts):
    class Constant:
        name, range, differentiable = "constant", (0.0, 1.0), False

        def __call__(self, images, prompts):
            return torch.full((len(prompts),), 0.3)

    term = Term(DDPO(), make_rollouts(rewards=[(Constant(), 1.0)]), name="ddpo")
    trainer = Trainer(make_policy(), [term], steps=1, watch=AnomalyWatch(zero_variance="skip"))
    before = state_of(trainer)
    metrics = trainer.run_step()
    assert same(before, state_of(trainer))
    assert metrics["ddpo/skipped"] == 1
    assert [event.watch for event in trainer.watch.events] == ["constant_reward", "zero_variance"]
    assert "reward 'constant' is 0.3 for all images" in trainer.watch.events[0].message

"""Rewards that run elsewhere are scored while the next images are drawn, with the same results and errors."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.sources import rollouts as rollouts_module
from agsm_rl.training.in_flight import InFlight

LONG = 120
"""Seconds after which a test that waits for what never comes fails."""


class Brightest:
    """The largest value of an image."""

    name = "brightest"
    range = (0.0, 1.0)
    differentiable = False
    elsewhere = False

    def __call__(self, images, prompts):
        return images.amax(dim=(1, 2, 3))


class Far(Brightest):
    """The same, elsewhere; it answers the first batch only when the second is being drawn."""

    elsewhere = True

    def __init__(self, drawing):
        self.drawing = drawing
        self.threads = []

    def __call__(self, images, prompts):
        self.threads.append(threading.current_thread())
        assert self.drawing[1].wait(LONG), "the second batch is drawn only after the first is scored"
        return super().__call__(images, prompts)


@pytest.fixture
def drawing(monkeypatch):
    """Events that are set when the first, the second, … batch begins to be drawn."""
    events = [threading.Event() for _ in range(4)]
    begun = iter(events)
    draw = rollouts_module.draw_trajectories

    def noted(*arguments, **options):
        next(begun).set()
        return draw(*arguments, **options)

    monkeypatch.setattr(rollouts_module, "draw_trajectories", noted)
    return events


def test_a_batch_is_scored_elsewhere_while_the_next_is_drawn(policy, make_rollouts, drawing):
    reward = Far(drawing)
    source = make_rollouts(rewards=[(reward, 1.0)], sample_batch_size=1, bind=True)
    source.next(policy)
    assert len(set(reward.threads)) == 1 and reward.threads[0] is not threading.main_thread()
    assert len(reward.threads) == 4


def test_what_is_scored_elsewhere_is_what_would_be_scored_here(policy, make_rollouts, drawing):
    far = make_rollouts(rewards=[(Far(drawing), 1.0)], sample_batch_size=2, bind=True).next(policy)
    here = make_rollouts(rewards=[(Brightest(), 1.0)], sample_batch_size=2, bind=True)
    found = here.next(policy)
    assert torch.equal(found.rewards, far.rewards) and torch.equal(found.advantages, far.advantages)
    assert torch.equal(found.trajectory, far.trajectory)


def test_a_failure_elsewhere_is_told_as_one_here_is(policy, make_rollouts):
    class Broken(Brightest):
        elsewhere = True

        def __call__(self, images, prompts):
            raise ValueError("out of order")

    source = make_rollouts(rewards=[(Broken(), 1.0)], sample_batch_size=1, bind=True)
    with pytest.raises(UserError, match="reward 'brightest': it failed with ValueError: out of order"):
        source.next(policy)


def test_images_that_are_not_finite_are_told_before_what_a_reward_says_of_them(policy, make_rollouts):
    class Strict(Brightest):
        elsewhere = True

        def __call__(self, images, prompts):
            raise UserError("never told")

    for parameter in policy.parameters().values():
        parameter.data.fill_(float("nan"))
    source = make_rollouts(rewards=[(Strict(), 1.0)], bind=True)
    with pytest.raises(UserError, match="images drawn are not finite"):
        source.next(policy)


def test_calls_run_one_after_another_and_none_begins_after_a_failure():
    done = []
    with InFlight("calls") as flight:
        first = flight.submit(lambda: done.append(1))
        failing = flight.submit(lambda: done.index("missing"))
        never = flight.submit(lambda: done.append(2))
        assert first.result(LONG) is None
        with pytest.raises(ValueError, match="not in list"):
            failing.result(LONG)
        with pytest.raises(CancelledError):
            never.result(LONG)
    assert done == [1]


def test_a_block_that_is_left_waits_for_no_call():
    begun, go = threading.Event(), threading.Event()
    with InFlight("calls") as flight:
        running = flight.submit(lambda: begun.set() or go.wait(LONG))
        waiting = flight.submit(lambda: None)
        assert begun.wait(LONG)
    assert not running.done()
    go.set()
    assert running.result(LONG)
    with pytest.raises(CancelledError):
        waiting.result(LONG)

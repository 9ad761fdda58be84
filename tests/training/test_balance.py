"""Balanced weights: how long each term's gradient is made, and that a run continues exactly."""

import math

import pytest
import torch

from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.score_matching import ScoreMatching
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.balance import GradientBalance


def test_factors_follow_the_mean_of_the_norms_without_bias_from_the_first_on():
    balance = GradientBalance(decay=0.9)
    assert balance.factor("a", 4.0) == pytest.approx(1 / 4)
    mean = (0.1 * 2.0 + 0.9 * 0.1 * 4.0) / (1 - 0.9**2)
    assert balance.factor("a", 2.0) == pytest.approx(1 / mean)
    assert balance.factor("b", 100.0) == pytest.approx(1 / 100)


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_leaves_the_mean_alone(norm):
    balance = GradientBalance()
    assert balance.factor("a", norm) == 1.0
    balance.factor("a", 0.5)
    assert balance.factor("a", norm) == pytest.approx(2.0)


def make_trainer(make_policy, make_pairs, *, steps=1, scale=1.0):
    terms = [
        Term(AGSM(group_size=2), make_pairs(), name="agsm", weight=3.0, trains=["tokens"]),
        Term(ScoreMatching(), make_pairs(), name="plain", weight=0.5, trains=["lora"]),
    ]
    if scale != 1.0:
        original = terms[1].objective.loss
        terms[1].objective.loss = lambda policy, batch: (lambda found: (scale * found[0], found[1]))(
            original(policy, batch)
        )
    return Trainer(make_policy(), terms, steps=steps, max_grad_norm=None, balance=GradientBalance(0.5))


def test_a_weight_is_the_length_of_its_terms_gradient_whatever_the_losses_scale(make_policy, make_pairs):
    gradients = []
    for scale in (1.0, 1000.0):
        trainer = make_trainer(make_policy, make_pairs, scale=scale)
        metrics = trainer.run_step()
        lengths = {
            name: math.sqrt(sum(float(value.grad.square().sum()) for value in found.values() if value.grad is not None))
            for name, found in ((name, trainer.policy.parameters([name])) for name in ("tokens", "lora"))
        }
        assert lengths == {"tokens": pytest.approx(3.0, rel=1e-4), "lora": pytest.approx(0.5, rel=1e-4)}
        assert metrics["plain/balance"] == pytest.approx(1 / metrics["plain/grad_norm"])
        gradients.append({name: value.grad for name, value in trainer.policy.parameters(["lora"]).items()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-4, atol=1e-7)


def test_a_balanced_run_continues_exactly(make_policy, make_pairs):
    whole = make_trainer(make_policy, make_pairs, steps=3)
    for _ in range(2):
        whole.run_step()
    state = whole.state_dict()
    last = whole.run_step()
    other = make_trainer(make_policy, make_pairs, steps=3)
    other.load_state_dict(state)
    again = other.run_step()
    assert {key: value for key, value in again.items() if key != "seconds"} == last

"""Combining gradients: the plain sum, and TorchJD's aggregators on gradients whose agreement is known."""

import builtins

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.combine import AGGREGATORS, find_combiner


def gradient(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def product(first, second):
    return sum(float((first[name] * second[name]).sum()) for name in first if name in second)


CONFLICTING = [gradient(a=[1.0, 0.0], b=[[0.2]]), gradient(a=[-0.8, 0.3], b=[[0.1]])]
AGREEING = [gradient(a=[1.0, 2.0]), gradient(a=[2.0, 4.0])]


@pytest.mark.parametrize("name", ["sum", *AGGREGATORS])
def test_one_gradient_is_left_as_it_is(name):
    alone = gradient(a=[0.3, -1.0])
    assert torch.equal(find_combiner(name)([alone], 0)["a"], alone["a"])


@pytest.mark.parametrize("name", AGGREGATORS)
def test_conflicting_gradients_become_one_that_harms_neither(name):
    assert product(*CONFLICTING) < 0
    combined = find_combiner(name)(CONFLICTING, 0)
    assert combined["b"].shape == (1, 1)
    assert all(product(combined, one) >= -1e-6 for one in CONFLICTING)
    assert product(find_combiner("sum")(CONFLICTING, 0), CONFLICTING[1]) < 0


@pytest.mark.parametrize("name", AGGREGATORS)
def test_gradients_of_one_direction_keep_it(name):
    combined = find_combiner(name)(AGREEING, 0)["a"]
    assert torch.nn.functional.cosine_similarity(combined, AGREEING[0]["a"], dim=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["upgrad", "pcgrad"])
def test_orthogonal_gradients_are_summed(name):
    first, second = gradient(a=[1.0, 0.0]), gradient(a=[0.0, 2.0])
    torch.testing.assert_close(find_combiner(name)([first, second], 0)["a"], torch.tensor([1.0, 2.0]))


def test_a_parameter_that_one_term_alone_reaches_gets_its_gradient():
    first, second = gradient(a=[1.0], b=[0.0]), gradient(b=[3.0])
    combined = find_combiner("upgrad")([first, second], 0)
    torch.testing.assert_close(combined["a"], torch.tensor([1.0]))
    torch.testing.assert_close(combined["b"], torch.tensor([3.0]))


def test_chance_in_a_combiner_is_fixed_by_the_seed_and_leaves_no_trace():
    generator = torch.Generator().manual_seed(0)
    gradients = [{"a": torch.randn(3, generator=generator)} for _ in range(6)]
    combine = find_combiner("pcgrad")
    state = torch.random.get_rng_state()
    results = [combine(gradients, seed)["a"] for seed in (0, 1, 2, 3, 0)]
    assert torch.equal(results[0], results[4])
    assert any(not torch.equal(results[0], other) for other in results[1:4])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_stack_trains_under_every_combiner(make_policy, make_pairs, make_rollouts, name):
    policy = make_policy()
    terms = [Term(AGSM(group_size=2), make_pairs(), name="agsm"), Term(DDPO(), make_rollouts(), name="ddpo")]
    trainer = Trainer(policy, terms, steps=2, combine=name)
    for _ in range(2):
        metrics = trainer.run_step()
    assert 0 < metrics["grad_norm"] < float("inf")


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_torchjd(name, *args, **kwargs):
        if name.startswith("torchjd"):
            raise ImportError("No module named 'torchjd'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torchjd)
    with pytest.raises(UserError, match=r"'mgda' is TorchJD's, which is not installed.*'agsm-rl\[torchjd\]'"):
        find_combiner("mgda")

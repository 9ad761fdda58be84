"""The invariants of a stack of terms (DESIGN §5), on the tiny backbone."""

import math
from dataclasses import dataclass

import pytest
import torch
from agsm_rl_rewards.brightness import Brightness
from torch.utils._python_dispatch import TorchDispatchMode

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.errors import UserError
from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.objectives.reward_backprop import RewardBackprop
from agsm_rl.policy import Policy
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.row_shares import RowShare


def parameters_of(policy):
    return {name: value.detach().clone() for name, value in policy.parameters().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def make_terms(make_pairs, make_rollouts):
    def make(agsm=1.0, ddpo=1.0, **options):
        return [
            Term(AGSM(), make_pairs(), name="agsm", weight=agsm, **options),
            Term(DDPO(), make_rollouts(), name="ddpo", weight=ddpo),
        ]

    return make


def test_a_term_of_weight_zero_changes_nothing(make_policy, make_terms):
    stacked, alone = make_policy(), make_policy()
    Trainer(stacked, make_terms(ddpo=0.0), steps=3).train()
    Trainer(alone, make_terms()[:1], steps=3).train()
    assert same(parameters_of(stacked), parameters_of(alone))


def test_the_gradient_of_a_stack_is_the_weighted_sum_of_its_terms_gradients(make_policy, make_terms):
    def gradient(*, agsm, ddpo):
        policy = make_policy()
        trainer = Trainer(policy, make_terms(agsm=agsm, ddpo=ddpo), steps=1, max_grad_norm=None)
        trainer.run_step()
        zeros = {name: torch.zeros_like(value) for name, value in policy.parameters().items()}
        return {name: zeros[name] if p.grad is None else p.grad for name, p in policy.parameters().items()}

    stack, agsm, ddpo = gradient(agsm=0.5, ddpo=2.0), gradient(agsm=1, ddpo=0), gradient(agsm=0, ddpo=1)
    for name in stack:
        torch.testing.assert_close(stack[name], 0.5 * agsm[name] + 2.0 * ddpo[name], rtol=1e-5, atol=1e-8)
        assert stack[name].abs().sum() > 0 or "negative" in name or "lora_A" in name


def test_a_seed_fixes_everything(make_policy, make_terms):
    first, second, other = make_policy(), make_policy(), make_policy()
    Trainer(first, make_terms(), steps=2, seed=3).train()
    Trainer(second, make_terms(), steps=2, seed=3).train()
    Trainer(other, make_terms(), steps=2, seed=4).train()
    assert same(parameters_of(first), parameters_of(second))
    assert not same(parameters_of(first), parameters_of(other))


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_resuming_from_a_state_equals_the_uninterrupted_run(make_policy, make_terms, make_rollouts, stop_at, tmp_path):
    """Stops also fall between two updates that share one draw of rollouts."""

    def terms():
        made = make_terms()
        made[1].source = make_rollouts(updates=2)
        return made

    whole = make_policy()
    log = []
    trainer = Trainer(whole, terms(), steps=5)
    while trainer.step < 5:
        log.append(trainer.run_step())

    begun = Trainer(make_policy(), terms(), steps=5)
    for _ in range(stop_at):
        begun.run_step()
    torch.save(begun.state_dict(), tmp_path / "state.pt")
    resumed_policy = make_policy()
    resumed = Trainer(resumed_policy, terms(), steps=5)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = [resumed.run_step() for _ in range(5 - stop_at)]
    assert rest == log[stop_at:]
    assert same(parameters_of(whole), parameters_of(resumed_policy))
    assert same(whole.state_dict()["ema"], resumed_policy.state_dict()["ema"])


def test_a_checkpoint_of_reordered_adapters_is_refused(make_backbone, make_pairs):
    def trainer(*names):
        made = {"tokens": SoftTokens(num_tokens=2), "lora": LoRA(rank=2, banks=2)}
        policy = Policy(make_backbone(), {name: made[name] for name in names})
        return Trainer(policy, [Term(AGSM(), make_pairs())], steps=1)

    state = trainer("tokens", "lora").state_dict()
    with pytest.raises(UserError, match="a different order from the recipe's"):
        trainer("lora", "tokens").load_state_dict(state)


def test_a_term_trains_only_the_adapters_it_names(make_policy, make_pairs):
    policy = make_policy()
    before = parameters_of(policy)
    Trainer(policy, [Term(AGSM(), make_pairs(), name="agsm", trains=["lora"])], steps=2).train()
    after = parameters_of(policy)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"lora"}


def test_a_term_runs_on_each_kth_step(make_policy, make_terms):
    terms = make_terms()
    terms[1].every = 2
    trainer = Trainer(make_policy(), terms, steps=4)
    ran = ["ddpo/loss" in trainer.run_step() for _ in range(4)]
    assert ran == [True, False, True, False]


def test_a_weight_schedule_is_linear_between_its_points(make_pairs):
    term = Term(AGSM(), make_pairs(), weight={10: 1.0, 0: 0.0, 20: 3.0})
    assert [term.weight_at(step) for step in (0, 5, 10, 15, 20, 99)] == [0, 0.5, 1, 2, 3, 3]


def test_two_terms_share_one_draw_of_a_source(make_policy, make_rollouts):
    source = make_rollouts()
    terms = [Term(DDPO(), source, name="ddpo"), Term(AGSM(group_size=2), source, name="agsm")]
    trainer = Trainer(make_policy(), terms, steps=1)
    metrics = trainer.run_step()
    assert source.state_dict()["draws"] == 1
    assert {"ddpo/loss", "agsm/loss", "cosine/ddpo/agsm"} <= set(metrics)
    assert -1 <= metrics["cosine/ddpo/agsm"] <= 1


def test_every_step_reports_each_term_s_loss_and_gradient_norm(make_policy, make_terms):
    metrics = Trainer(make_policy(), make_terms(agsm=0.5), steps=1).run_step()
    assert metrics["loss"] == pytest.approx(0.5 * metrics["agsm/loss"] + metrics["ddpo/loss"])
    for key in ("agsm/grad_norm", "ddpo/grad_norm", "ddpo/reward", "grad_norm"):
        assert math.isfinite(metrics[key])


@dataclass
class Broken:
    """An objective whose loss is not a number."""

    value: float
    consumes = PairBatch

    def check(self, batch_size):
        pass

    def split(self, batch):
        return [(batch, 1.0)]

    def loss(self, policy, batch):
        return sum(p.sum() for p in policy.parameters().values()) * self.value, {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_term_s_name_and_changes_nothing(make_policy, make_pairs, value):
    policy = make_policy()
    before = parameters_of(policy)
    trainer = Trainer(policy, [Term(Broken(value), make_pairs(), name="broken")], steps=2)
    with pytest.raises(UserError, match="step 1: objective 'broken'"):
        trainer.train()
    assert same(before, parameters_of(policy))


def test_the_shadow_follows_the_parameters_by_its_decay(make_policy, make_pairs):
    policy = make_policy(ema_decay=0.75)
    start = parameters_of(policy)
    Trainer(policy, [Term(AGSM(), make_pairs(), name="agsm")], steps=1).train()
    live, shadow = parameters_of(policy), policy.state_dict()["ema"]
    for name in start:
        torch.testing.assert_close(shadow[name], 0.75 * start[name] + 0.25 * live[name])


def test_the_shadow_warms_up_and_follows_every_few_steps_as_flow_grpos_does(make_backbone, make_adapters):
    policy = Policy(make_backbone(), make_adapters(), ema_decay=0.9, ema_warm_up=True, ema_every=8)
    start = parameters_of(policy)
    for parameter in policy.parameters().values():
        parameter.data += 1.0
    kept = 1.0
    for step in range(1, 97):
        policy.update_ema(step)
        if step % 8 == 0:
            kept *= min(0.9, (1 + step) / (10 + step))  # their get_current_decay
    for name, shadow in policy.state_dict()["ema"].items():
        torch.testing.assert_close(shadow, start[name] + (1 - kept), rtol=0, atol=1e-5)


def test_predictions_under_the_shadow_leave_the_parameters_in_place(make_policy):
    policy = make_policy()
    before = parameters_of(policy)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(1.0)
    x_t = torch.randn(2, *policy.backbone.latent_shape)
    cond, t = policy.backbone.encode_text(["a", "b"]), torch.full((2,), 0.5)
    shadow, live = policy.ema(x_t, t, cond), policy.live(x_t, t, cond)
    assert not torch.allclose(shadow, live)
    assert same({name: value + 1 for name, value in before.items()}, parameters_of(policy))


def test_the_reference_is_the_base_model_exactly(make_policy, make_backbone):
    policy, bare = make_policy(), make_backbone()
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(1.0)
    x_t, t = torch.randn(2, *bare.latent_shape), torch.tensor([0.2, 0.9])
    cond = bare.encode_text(["a red star", ""])
    with torch.no_grad():
        assert torch.equal(policy.reference(x_t, t, cond), bare.predict(x_t, t, cond))
        assert not torch.equal(policy.live(x_t, t, cond), bare.predict(x_t, t, cond))


def test_two_terms_with_the_same_name_are_refused(make_policy, make_pairs):
    terms = [Term(AGSM(), make_pairs(), name="agsm"), Term(AGSM(), make_pairs(), name="agsm")]
    with pytest.raises(UserError, match="two terms have the same name"):
        Trainer(make_policy(), terms, steps=1)


def test_a_source_that_gives_another_batch_than_the_objective_consumes_is_refused(make_pairs):
    with pytest.raises(UserError, match="learns from a RolloutBatch, but its source gives a PairBatch"):
        Term(DDPO(), make_pairs(), name="ddpo")


@pytest.mark.parametrize("objective", [DDPO(), FlowGRPO(), RewardBackprop([(Brightness(), 1.0)])])
def test_a_range_of_noise_levels_is_refused_where_none_are_drawn(make_rollouts, objective):
    with pytest.raises(UserError, match=r"term: t is \[0.5, 1.0\], but .* leave it out"):
        Term(objective, make_rollouts(), name="term", t=(0.5, 1.0))


def test_a_shared_source_draws_the_same_whichever_terms_learn_from_it(make_policy, make_rollouts):
    def rewards(*names):
        source = make_rollouts()
        terms = [Term(DDPO(), source, name=name, source_name="own") for name in names]
        return Trainer(make_policy(), terms, steps=1).run_step()[f"{names[-1]}/reward"]

    assert rewards("first", "second") == rewards("second")


def test_under_autocast_the_shadow_s_weights_do_not_leak_into_live_predictions(make_policy):
    policy = make_policy()
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.5)
    x_t, t = torch.randn(2, *policy.backbone.latent_shape), torch.full((2,), 0.5)
    cond = policy.backbone.encode_text(["a", "b"])
    with torch.autocast("cpu", torch.bfloat16):
        alone = policy.live(x_t, t, cond)
        policy.ema(x_t, t, cond)
        after = policy.live(x_t, t, cond)
    assert torch.equal(alone, after)


def test_terms_with_an_offset_alternate(make_policy, make_pairs):
    terms = [
        Term(AGSM(), make_pairs(), name="even", every=2),
        Term(AGSM(), make_pairs(), name="odd", every=2, offset=1),
        Term(AGSM(), make_pairs(), name="late", offset=3),
    ]
    trainer = Trainer(make_policy(), terms, steps=5)
    ran = []
    for _ in range(5):
        metrics = trainer.run_step()
        ran.append({key.removesuffix("/loss") for key in metrics if key.endswith("/loss")})
    assert ran == [{"even"}, {"odd"}, {"even"}, {"odd", "late"}, {"even", "late"}]


def test_a_term_s_figures_are_fetched_in_one_go(make_policy, make_pairs):
    trainer = Trainer(make_policy(), [Term(AGSM(group_size=2), make_pairs(), name="agsm")], steps=1)
    fetches = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
                fetches.append(func)
            return func(*args, **(kwargs or {}))

    batch = trainer.terms[0].source.next(trainer.policy)
    with Counting():
        _, figures = trainer._learn(trainer.terms[0], batch, RowShare(len(batch)))
    assert {"loss", "grad_norm", "positive_loss", "negative_loss", "win_rate"} <= figures.keys()
    assert all(isinstance(value, float) for value in figures.values())
    assert not fetches


def test_a_training_returns_each_step_s_metrics_and_the_adapters(policy, make_terms, capsys):
    trainer = Trainer(policy, make_terms()[:1], steps=3)
    result = trainer.train()
    assert [figures["step"] for figures in result.history] == [1, 2, 3] and result.steps == 3
    assert all(figures["agsm/loss"] == figures["loss"] for figures in result.history)
    assert result.adapters == policy.adapters and repr(result).startswith("<TrainingResult after 3 steps, loss ")
    assert capsys.readouterr().err == ""  # not on a terminal
    trainer.steps = 4
    assert [figures["step"] for figures in trainer.train(history=False).history] == []


def test_the_bar_is_shown_on_a_terminal_unless_it_is_turned_off(policy, make_terms, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    trainer = Trainer(policy, make_terms()[:1], steps=1)
    trainer.train(progress=False)
    assert capsys.readouterr().err == ""
    trainer.steps = 2
    trainer.train()
    assert "2/2" in capsys.readouterr().err

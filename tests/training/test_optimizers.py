"""Optimizers by name and the learning rate's schedule: the packages' own numbers, and exact continuation."""

import sys

import pytest
import torch
from diffusers.optimization import get_scheduler

from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.errors import UserError
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.policy import Policy
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.optimizers import OPTIMIZERS
from agsm_rl.training.schedules import SCHEDULES, CosineWarmRestarts, LearningRates

PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
COSINE = {"use": "cosine", "warmup_steps": 2}


def rates(schedule, *, highest=1e-3, steps=40):
    curve = LearningRates(highest, ["lora"], schedule=schedule, steps=steps)
    return [curve._curves[highest](step) for step in range(steps)]


def rates_of(scheduler, optimizer, steps=40):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("constant", {"warmup_steps": 5}),
        ("linear", {"warmup_steps": 5}),
        ("cosine", {"warmup_steps": 5}),
        ("cosine_with_restarts", {"warmup_steps": 5, "num_cycles": 3}),
        ("polynomial", {"warmup_steps": 5, "power": 2.0}),
    ],
)
def test_the_rates_are_those_of_diffusers(name, options):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    named = {"num_warmup_steps" if key == "warmup_steps" else key: value for key, value in options.items()}
    curve = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(curve, optimizer, num_training_steps=40, **named)
    assert rates({"use": name, **options}) == pytest.approx(rates_of(scheduler, optimizer))


@pytest.mark.parametrize(("T_0", "T_mult"), [(3, 1), (3, 2)])
def test_warm_restarts_are_those_of_torch(T_0, T_mult):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0, T_mult, eta_min=1e-5)
    wanted = rates_of(scheduler, optimizer)
    found = rates({"use": "cosine_warm_restarts", "T_0": T_0, "T_mult": T_mult, "every": 1})
    assert found == pytest.approx(wanted)
    slow = CosineWarmRestarts(T_0=T_0, T_mult=T_mult, every=10).rate(1e-3, 0)
    assert [slow(10 * step + 9) for step in range(40)] == pytest.approx(wanted)


def test_a_constant_rate_is_exactly_the_given_one():
    assert set(rates("constant", highest=1 / 3)) == {1 / 3}


def test_without_options_training_is_torchs_adamw_at_a_constant_rate(make_policy, make_pairs):
    policy = make_policy()
    trainer = Trainer(policy, [Term(AGSM(), make_pairs(), name="agsm")], steps=2)
    (group, _) = trainer.optimizer.param_groups
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-3, 1e-4, (0.9, 0.999), 1e-8)
    assert [trainer.run_step()["learning_rate"] for _ in range(2)] == [1e-3, 1e-3]


def parameters_of(policy):
    return {name: value.detach().clone() for name, value in policy.parameters().items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_the_uninterrupted_one(name, make_policy, make_pairs, tmp_path):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])

    def trainer(policy):
        optimizer = {"use": name} | ({"min_8bit_size": 16} if name == "adamw_8bit" else {})
        terms = [Term(AGSM(), make_pairs(), name="agsm")]
        return Trainer(policy, terms, steps=5, optimizer=optimizer, schedule=COSINE)

    whole = make_policy()
    uninterrupted = trainer(whole)
    log = [uninterrupted.run_step() for _ in range(3)]
    torch.save(uninterrupted.state_dict(), tmp_path / "state.pt")
    log += [uninterrupted.run_step() for _ in range(2)]
    policy = make_policy()
    resumed = trainer(policy)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.run_step() for _ in range(2)] == log[3:]
    moved = parameters_of(make_policy())
    for key, value in parameters_of(whole).items():
        assert torch.equal(value, parameters_of(policy)[key])
    assert any(not torch.equal(value, moved[key]) for key, value in parameters_of(whole).items())
    assert len({metrics["learning_rate"] for metrics in log}) > 2


def test_rates_by_adapter_follow_the_schedule_each(make_policy, make_pairs):
    terms = [Term(AGSM(), make_pairs(), name="agsm")]
    given = {"tokens": 1e-2, "lora": 1e-4}
    trainer = Trainer(make_policy(), terms, steps=4, learning_rate=given, schedule={"use": "linear"})
    metrics = [trainer.run_step() for _ in range(2)][1]
    assert "learning_rate" not in metrics
    assert metrics["learning_rate/tokens"] == pytest.approx(0.75e-2)
    assert metrics["learning_rate/lora"] == pytest.approx(0.75e-4)


def test_muon_trains_matrices_and_adamw_the_rest_and_says_so(make_policy, make_pairs, caplog):
    policy = make_policy()
    trainer = Trainer(policy, [Term(AGSM(), make_pairs(), name="agsm")], steps=1, optimizer="muon")
    muon, adamw = trainer.optimizer.parts
    assert {p.ndim for group in muon.param_groups for p in group["params"]} == {2}
    assert 2 not in {p.ndim for group in adamw.param_groups for p in group["params"]}
    assert "two dimensions only" in caplog.text
    before = parameters_of(policy)
    trainer.run_step()
    assert any(not torch.equal(before[name], value) for name, value in policy.parameters().items())


def test_muon_alone_where_all_parameters_are_matrices(backbone, make_pairs):
    policy = Policy(backbone, {"tokens": SoftTokens(num_tokens=2, banks=1, time_tokens=False)})
    dimensions = {parameter.ndim for parameter in policy.parameters().values()}
    trainer = Trainer(policy, [Term(AGSM(), make_pairs(), name="agsm")], steps=1, optimizer="muon")
    assert (type(trainer.optimizer) is torch.optim.Muon) == (dimensions == {2})
    assert trainer.run_step()["grad_norm"] > 0


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_installed_is_named(name, make_policy, make_pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    monkeypatch.setitem(sys.modules, f"{PACKAGES[name]}.optim", None)
    with pytest.raises(UserError, match=f"'{name}' needs {PACKAGES[name]}.*pip install {PACKAGES[name]}"):
        Trainer(make_policy(), [Term(AGSM(), make_pairs())], steps=1, optimizer=name)


PAIRS = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 24}


def recipe(checkpoint="builtin:shapes-sd15", **optimizer):
    return Recipe.from_data(
        {
            "steps": 4,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(checkpoint), "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}, "tokens": {"use": "soft_tokens"}},
            "objectives": [{"use": "agsm", "source": PAIRS}],
            "optimizer": optimizer,
        }
    )


def test_a_recipe_is_completed_with_the_own_options_of_its_optimizer_and_schedule():
    found = recipe(use="adafactor", d=2.0, schedule="cosine_with_restarts").to_data()["optimizer"]
    assert found["schedule"] == {"use": "cosine_with_restarts", "warmup_steps": 0, "num_cycles": 1}
    assert (found["d"], found["beta2_decay"], found["eps"]) == (2.0, -0.8, [None, 1e-3])
    assert recipe(**found).to_data()["optimizer"] == found


def test_a_recipes_optimizer_and_schedule_reach_the_trainer(tiny_checkpoint):
    trainer = build_trainer(recipe(tiny_checkpoint, use="adafactor", learning_rate=0.01, schedule={"use": "linear"}))
    assert type(trainer.optimizer) is torch.optim.Adafactor
    assert [trainer.run_step()["learning_rate"] for _ in range(2)] == pytest.approx([0.01, 0.0075])


def test_prodigys_rate_is_one_unless_it_is_given():
    assert recipe(use="prodigy").optimizer.learning_rate == 1.0
    assert recipe(use="prodigy", learning_rate=0.5).optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"lr": 1e-3}, ["'lr' is not an option here", "Did you mean 'learning_rate'?"]),
        ({"lr_scheduler": "cosine"}, ["Did you mean 'schedule'?"]),
        ({"lr_warmup_steps": 5}, ["Did you mean 'schedule.warmup_steps'?"]),
        ({"schedule": {"use": "cosine", "lr_warmup_steps": 5}}, ["optimizer.schedule", "'warmup_steps'?"]),
        ({"use": "adam"}, ["optimizer.use: 'adam' is not an optimizer", "adamw"]),
        ({"schedule": "cosin"}, ["optimizer.schedule.use: 'cosin' is not a schedule", "Did you mean 'cosine'?"]),
        ({"schedule": {"use": "cosine", "num_cycles": 2}}, ["optimizer.schedule", "'num_cycles'"]),
        ({"schedule": {"use": "linear", "warmup_steps": -1}}, ["optimizer.schedule", "warmup_steps", "-1"]),
        ({"use": "adafactor", "betas": [0.5, 0.9]}, ["optimizer.betas", "Adafactor has none"]),
        ({"use": "prodigy", "learning_rate": {"lora": 1.0, "tokens": 0.5}}, ["learning_rate", "same rate"]),
        ({"weight_decay": True}, ["weight_decay", "true", "number"]),
    ],
)
def test_mistakes_are_refused_with_what_is_allowed(optimizer, words):
    with pytest.raises(UserError) as refused:
        recipe(**optimizer)
    for word in words:
        assert word in str(refused.value)


def test_every_schedule_begins_and_stays_at_or_below_the_given_rate():
    for name in SCHEDULES:
        assert max(rates(name)) <= 1e-3 and min(rates(name)) >= 0


def test_the_trainer_refuses_unknown_names_and_options(make_policy, make_pairs):
    for options in ({"optimizer": "adamv"}, {"optimizer": {"use": "muon", "momentun": 1}}, {"schedule": "cosin"}):
        with pytest.raises(UserError, match="Did you mean"):
            Trainer(make_policy(), [Term(AGSM(), make_pairs())], steps=1, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_as_large_as_predicted(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 640), (640, 8), (2, 4, 768), (2, 5, 4, 64), (100, 64), (7,)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    kind = OPTIMIZERS[name]()
    optimizer = kind.make([{"params": parameters, "lr": 1e-3}], weight_decay=0.0, betas=(0.9, 0.999))
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    kept = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    }
    assert kind.state_bytes(parameters) == pytest.approx(sum(kept.values()), rel=0.05)

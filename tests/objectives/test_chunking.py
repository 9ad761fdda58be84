"""However a batch is cut to save memory, the optimiser comes to the same parameters within 1e-5."""

from functools import partial

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.anchor import Anchor
from agsm_rl.objectives.awm import AWM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.diffusion_dpo import DiffusionDPO
from agsm_rl.objectives.diffusion_nft import DiffusionNFT
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.objectives.inpo import InPO
from agsm_rl.objectives.score_matching import ScoreMatching
from agsm_rl.objectives.softrepa import SoftREPA
from agsm_rl.policy import Policy
from agsm_rl.sources.preferences import Preferences
from agsm_rl.trainer import Term, Trainer

STEPS = 2
RATE = 3e-4  # DDPO's published one
# AdamW divides a gradient by its own size: with the default `eps`, an element whose gradient is rounding noise may move
# by a share of the rate, another one on each machine.
OPTIMIZER = {"use": "adamw", "eps": 1e-4}


def trained(policy, objective, source):
    """The parameters after a few steps of AdamW."""
    trainer = Trainer(policy, [Term(objective, source)], steps=STEPS, learning_rate=RATE, optimizer=OPTIMIZER)
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in policy.parameters().items()}


def assert_same(one, other, before):
    moved = max(float((one[name] - before[name]).abs().max()) for name in before)
    assert moved > RATE / 2  # something was learned, or nothing would be shown
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def check(make_policy, make_objective, make_source, sizes, option):
    """Train with the batch whole, and again with it in parts of each size."""
    policy = make_policy()
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters().items()}
    whole = trained(policy, make_objective(), make_source())
    for size in sizes:
        assert_same(whole, trained(make_policy(), make_objective(**{option: size}), make_source()), before)


@pytest.mark.parametrize("objective", [AGSM, SoftREPA])
def test_contrast_in_passes_of_few_groups_trains_as_all_groups_at_once(make_policy, make_pairs, objective):
    check(
        make_policy,
        lambda **options: objective(group_size=2, **options),
        lambda: make_pairs(batch_size=6),
        (1, 2),
        "groups_per_pass",
    )


@pytest.mark.parametrize(
    "objective",
    [AGSM, partial(AGSM, negatives=2), partial(AGSM, noise="group"), partial(AGSM, groups_per_pass=1), SoftREPA],
)
def test_contrast_in_passes_of_few_images_trains_as_all_groups_at_once(make_policy, make_pairs, objective):
    check(make_policy, partial(objective, group_size=3), lambda: make_pairs(batch_size=6), (1, 4), "images_per_pass")


@pytest.mark.parametrize("objective", [ScoreMatching, Anchor])
def test_pairs_in_passes_of_few_rows_train_as_all_at_once(make_policy, make_pairs, objective):
    check(make_policy, objective, make_pairs, (1, 3), "rows_per_pass")


def test_preferences_in_passes_of_few_rows_train_as_all_at_once(make_policy):
    def source():
        return Preferences("builtin:shapes-preferences", 4, num_pairs=8)

    for objective in (DiffusionDPO, InPO):
        check(make_policy, partial(objective, beta=100.0), source, (1, 3), "rows_per_pass")


@pytest.mark.parametrize(
    ("objective", "option"),
    [(DDPO, "images_per_pass"), (DiffusionNFT, "rows_per_pass"), (AWM, "rows_per_pass")],
    ids=lambda one: str(one),
)
def test_rollouts_in_passes_of_few_images_train_as_all_at_once(make_policy, make_rollouts, objective, option):
    check(make_policy, objective, make_rollouts, (1, 3), option)


def test_flow_grpo_in_passes_of_few_images_trains_as_all_at_once(tiny_sd3_checkpoint, make_rollouts):
    def make_policy():
        return Policy(load_backbone(str(tiny_sd3_checkpoint), device="cpu"), {"lora": LoRA(rank=2)}, ema_decay=0.9)

    check(make_policy, FlowGRPO, make_rollouts, (1, 3), "images_per_pass")


@pytest.mark.parametrize("objective", [DDPO, FlowGRPO])
def test_several_steps_in_a_pass_train_as_one_at_a_time(each_checkpoint, make_rollouts, objective):
    def make_policy():
        return Policy(load_backbone(str(each_checkpoint), device="cpu"), {"lora": LoRA(rank=2)}, ema_decay=0.9)

    check(make_policy, objective, lambda: make_rollouts(guidance=3.0), (3, 4), "steps_per_pass")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rollouts_drawn_few_at_a_time_train_as_those_drawn_all_at_once(make_policy, make_rollouts, guidance):
    policy = make_policy()
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters().items()}
    whole = trained(policy, DDPO(), make_rollouts(guidance=guidance))
    for size in (1, 3):
        parts = trained(make_policy(), DDPO(), make_rollouts(guidance=guidance, sample_batch_size=size))
        assert_same(whole, parts, before)

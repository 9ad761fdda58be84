"""A term's old policy: its own copy, its own schedule, drawing, and exact continuation."""

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.diffusion_nft import DiffusionNFT
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.old_policy import OldPolicy


def copies(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.parameters().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def make_trainer(make_policy, make_rollouts, make_pairs):
    """NFT with an old policy beside AGSM with the EMA: two updates per draw, drawn by the old policy."""

    def make(*, steps=6, decay=0.0, every="draw", drawn_by="old"):
        source = make_rollouts(updates=2, eta=0.0, drawn_by=drawn_by)
        nft = Term(DiffusionNFT(old=OldPolicy(decay, every)), source, name="nft")
        return Trainer(make_policy(), [nft, Term(AGSM(group_size=2), make_pairs(), name="agsm")], steps=steps)

    return make


def test_it_is_copied_once_a_draw(make_trainer):
    trainer = make_trainer()
    start = copies(trainer.policy)
    trainer.run_step()
    assert same(trainer.policy._old["nft"], start)
    trainer.run_step()
    assert same(trainer.policy._old["nft"], copies(trainer.policy))
    assert not same(trainer.policy._old["nft"], trainer.policy.state_dict()["ema"])


def test_its_decay_follows_the_schedule_of_steps(make_trainer):
    trainer = make_trainer(decay={0: 0.0, 2: 0.5}, every=1)
    for step in range(4):
        before = {name: value.clone() for name, value in trainer.policy._old["nft"].items()}
        trainer.run_step()
        decay = (0.0, 0.25, 0.5, 0.5)[step]
        for name, live in copies(trainer.policy).items():
            torch.testing.assert_close(trainer.policy._old["nft"][name], decay * before[name] + (1 - decay) * live)


def test_it_counts_the_steps_in_which_its_term_learns(make_policy, make_rollouts, make_pairs):
    nft = Term(DiffusionNFT(old=OldPolicy(every=2)), make_rollouts(eta=0.0), name="nft", every=3, offset=1)
    trainer = Trainer(make_policy(), [nft, Term(AGSM(group_size=2), make_pairs(), name="agsm")], steps=8)
    updated = []
    for step in range(8):
        trainer.run_step()
        if same(trainer.policy._old["nft"], copies(trainer.policy)):
            updated.append(step)
    assert updated == [4]  # it learns in steps 1, 4 and 7; every second time is 4


def test_of_two_terms_on_a_source_the_one_that_learns_now_draws(make_policy, make_rollouts):
    source = make_rollouts(eta=0.0, drawn_by="old")
    weights = {"first": {0: 1.0, 1: 0.0}, "second": {0: 0.0, 1: 1.0}}
    terms = [
        Term(DiffusionNFT(old=OldPolicy()), source, name=name, weight=weight, source_name="shared")
        for name, weight in weights.items()
    ]
    trainer, drawn_for = Trainer(make_policy(), terms, steps=3), []
    draw = source.next

    def watched(policy):
        drawn_for.append(policy.acting_for)
        return draw(policy)

    source.next = watched
    for _ in range(3):
        trainer.run_step()
    assert drawn_for == ["first", "second", "second"]


def test_the_ema_is_not_touched_by_it(make_trainer, make_policy, make_rollouts, make_pairs):
    trainer = make_trainer()
    start = copies(trainer.policy)
    trainer.run_step()
    for name, live in copies(trainer.policy).items():
        torch.testing.assert_close(trainer.policy.state_dict()["ema"][name], 0.9 * start[name] + 0.1 * live)


def test_old_predictions_are_those_of_the_terms_own_copy(make_trainer):
    trainer = make_trainer()
    policy = trainer.policy
    with torch.no_grad():
        for shift, tensors in ((0.5, policy._old["nft"]), (-0.5, policy._shadow)):
            for tensor in tensors.values():
                tensor.add_(shift)
    x_t, t = torch.randn(2, *policy.backbone.latent_shape), torch.full((2,), 0.5)
    cond = policy.backbone.encode_text(["a", "b"])
    before = copies(policy)
    policy.acting_for = "nft"
    own = policy.old(x_t, t, cond)
    policy.acting_for = "agsm"
    assert torch.equal(policy.old(x_t, t, cond), policy.ema(x_t, t, cond))
    assert not torch.allclose(own, policy.ema(x_t, t, cond))
    assert same(before, copies(policy))


def test_rollouts_can_be_drawn_by_it(make_trainer):
    def drawn(change, drawn_by):
        trainer = make_trainer(drawn_by=drawn_by)
        with torch.no_grad():
            for tensor in change(trainer.policy).values():
                tensor.add_(0.5)
        trainer.run_step()
        return trainer.terms[0].source.metrics()["x0_norm"]

    by_old = drawn(lambda policy: policy._old["nft"], "old")
    assert by_old != drawn(lambda policy: {}, "old")
    assert by_old == drawn(lambda policy: policy._shadow, "ema")


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(make_trainer, stop_at, tmp_path):
    options = {"steps": 5, "decay": {0: 0.0, 4: 0.5}}
    whole, begun, resumed = (make_trainer(**options) for _ in range(3))
    log = [whole.run_step() for _ in range(5)]
    for _ in range(stop_at):
        begun.run_step()
    torch.save(begun.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.run_step() for _ in range(5 - stop_at)] == log[stop_at:]
    assert same(copies(whole.policy), copies(resumed.policy))
    assert same(whole.policy._old["nft"], resumed.policy._old["nft"])


def test_without_old_policies_checkpoints_are_as_before(policy):
    assert set(policy.state_dict()) == {"live", "ema"}


def recipe(**old):
    rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"brightness": 1.0}, "eta": 0.0}
    return Recipe.from_data(
        {
            "steps": 4,
            "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15", "device": "cpu"},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": [{"use": "diffusion_nft", "source": rollouts | {"drawn_by": "old"}, "old": old}],
        }
    )


def test_a_recipe_gives_it_its_schedule_and_keeps_it():
    made = recipe(decay={0: 0.0, 100: 0.5}, every="draw")
    (term,) = made.parts.terms(made)
    assert [term.objective.old.decay_at(step) for step in (0, 50, 200)] == [0.0, 0.25, 0.5]
    again = Recipe.from_data(made.to_data())
    assert again.to_data() == made.to_data()


@pytest.mark.parametrize(
    ("old", "words"),
    [
        ({"decay": 1.5}, "old.decay: got 1.5"),
        ({"decay": {}}, "schedule is empty"),
        ({"decay": {-1: 0.5}}, "steps from 0 on"),
        ({"every": 0}, "old.every: got 0"),
        ({"every": "epoch"}, "old.every"),
        ({"decya": 0.5}, "decya"),
    ],
)
def test_mistakes_are_refused(old, words):
    with pytest.raises(UserError, match=words):
        recipe(**old)

"""Rollouts that keep the graph of their draw: the gradient is that of predictions computed anew, and none are."""

import weakref

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.policy import Policy
from agsm_rl.sources.views import BestImages
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training import kept_graph


@pytest.fixture
def make_moved(make_adapters):
    """Policies away from their base, so that Flow-GRPO's KL has a gradient."""

    def make(backbone, adapters=None):
        policy = Policy(backbone, adapters or make_adapters(), ema_decay=0.9)
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.parameters().values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return policy

    return make


def gradient(policy, objective, batch):
    """Of the whole batch, in the objective's parts, as one vector."""
    parameters = list(policy.parameters().values())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters))
    for part, share in objective.split(batch):
        loss, _ = objective.loss(policy, part)
        found = torch.autograd.grad(loss * share, parameters, allow_unused=True, materialize_grads=True)
        total += torch.cat([value.flatten() for value in found])
    return total


def assert_same_gradient(policy, make_rollouts, objective, *, within=1e-6, **options):
    options = {"guidance": 3.0, "advantages": "group"} | options
    anew, kept = (make_rollouts(bind=True, keep_graph=keep, **options).next(policy) for keep in (False, True))
    assert torch.equal(anew.trajectory, kept.trajectory) and torch.equal(anew.log_probs, kept.log_probs)
    expected = gradient(policy, objective, anew)
    assert expected.norm() > 0
    assert (gradient(policy, objective, kept) - expected).norm() < within * expected.norm()


@pytest.mark.parametrize("objective", [DDPO(), FlowGRPO(kl_weight=0.5)], ids=["ddpo", "flow_grpo"])
def test_the_gradient_is_that_of_predictions_computed_anew(each_backbone, make_moved, make_rollouts, objective):
    assert_same_gradient(make_moved(each_backbone), make_rollouts, objective)


def test_it_is_so_with_gradient_checkpointing(tiny_checkpoint, make_moved, make_rollouts):
    backbone = load_backbone(str(tiny_checkpoint), device="cpu", gradient_checkpointing=True)
    assert_same_gradient(make_moved(backbone), make_rollouts, DDPO())


def test_it_is_so_with_trained_text_encoders(make_backbone, make_moved, make_rollouts):
    policy = make_moved(make_backbone(), {"lora": LoRA(rank=2, text_encoders=True)})
    assert_same_gradient(policy, make_rollouts, DDPO())


def test_it_is_so_in_any_passes_and_with_a_fraction_of_the_steps(make_backbone, make_moved, make_rollouts):
    policy = make_moved(make_backbone())
    # Other numbers of rows in a pass are added up in another order.
    for objective in (DDPO(timestep_fraction=0.5, images_per_pass=1), FlowGRPO(kl_weight=0.5, steps_per_pass=3)):
        assert_same_gradient(policy, make_rollouts, objective, within=1e-5, sample_batch_size=3)


@pytest.mark.parametrize("rows", [[3, 1], [3, 1, 0, 2]], ids=["some", "all, in another order"])
def test_chosen_rows_of_the_draw_have_their_own_gradient(make_backbone, make_moved, make_rollouts, rows):
    policy, few = make_moved(make_backbone()), torch.tensor(rows)
    anew, kept = (make_rollouts(bind=True, keep_graph=keep).next(policy).select(few) for keep in (False, True))
    torch.testing.assert_close(gradient(policy, DDPO(), kept), gradient(policy, DDPO(), anew), rtol=1e-4, atol=1e-6)


def test_no_prediction_is_computed_a_second_time(policy, make_rollouts, monkeypatch):
    batch = make_rollouts(bind=True, keep_graph=True).next(policy)
    monkeypatch.setattr(policy.backbone, "predict", None)
    monkeypatch.setattr(policy.backbone, "encode_text", None)
    assert gradient(policy, DDPO(), batch).norm() > 0


def with_room(policy, make_rollouts, monkeypatch, free, *, objective=DDPO(), **options):  # noqa: B008
    """A draw that a policy gradient is to learn from, on a machine with so many free bytes."""
    policy.graph_for = objective
    monkeypatch.setattr(kept_graph, "free_memory", lambda device: free)
    return make_rollouts(bind=True, guidance=3.0, advantages="group", **options)


@pytest.mark.parametrize("options", [{}, {"sde_window": {"size": 2, "range": [1, 4]}}], ids=["all steps", "window"])
def test_a_graph_that_there_is_room_for_is_kept_and_gives_the_same_gradient_bit_for_bit(
    each_backbone, make_moved, make_rollouts, monkeypatch, options
):
    policy = make_moved(each_backbone)
    kept = with_room(policy, make_rollouts, monkeypatch, 2**40, **options).next(policy)
    anew = make_rollouts(bind=True, guidance=3.0, advantages="group", graph_memory=0.0, **options).next(policy)
    assert anew.graph is None and kept.graph.holds(kept.steps)
    assert torch.equal(anew.trajectory, kept.trajectory)
    expected = gradient(policy, DDPO(), anew)
    monkeypatch.setattr(policy.backbone, "predict", None)
    assert torch.equal(gradient(policy, DDPO(), kept), expected) and expected.norm() > 0


def test_a_kept_graph_of_the_conditional_branch_has_the_gradient_through_that_alone(
    each_backbone, make_moved, make_rollouts, monkeypatch
):
    policy, objective = make_moved(each_backbone), FlowGRPO(kl_weight=0.0, detach_unconditional=True)
    kept = with_room(policy, make_rollouts, monkeypatch, 2**40, objective=objective).next(policy)
    anew = make_rollouts(bind=True, guidance=3.0, advantages="group", graph_memory=0.0).next(policy)
    torch.testing.assert_close(kept.trajectory, anew.trajectory)
    expected = gradient(policy, objective, anew)
    assert kept.graph.holds(kept.steps)
    assert (gradient(policy, objective, kept) - expected).norm() < 1e-5 * expected.norm()
    assert not kept.graph.holds(kept.steps)


def test_an_objective_of_both_branches_leaves_the_graph_of_one_alone(policy, make_rollouts, monkeypatch):
    detaching = FlowGRPO(kl_weight=0.0, detach_unconditional=True)
    kept = with_room(policy, make_rollouts, monkeypatch, 2**40, objective=detaching).next(policy)
    assert gradient(policy, DDPO(), kept).norm() > 0
    assert kept.graph.holds(kept.steps)


def test_a_run_that_had_no_room_keeps_no_graph_after_a_resume(policy, make_rollouts, monkeypatch):
    source = with_room(policy, make_rollouts, monkeypatch, 2**10)
    source.next(policy)
    resumed = with_room(policy, make_rollouts, monkeypatch, 2**40)
    resumed.load_state_dict(source.state_dict())
    assert resumed.next(policy).graph is None
    assert resumed.state_dict()["keeps_no_graph"]


def test_no_graph_is_kept_where_there_is_no_room_and_that_is_measured_once(policy, make_rollouts, monkeypatch):
    source = with_room(policy, make_rollouts, monkeypatch, 2**10)
    assert not source.next(policy).graph.holds((0,))
    monkeypatch.setattr(kept_graph, "free_memory", None)
    assert source.next(policy).graph is None


def test_what_was_measured_without_room_is_freed(make_backbone, monkeypatch):
    monkeypatch.setattr(kept_graph, "free_memory", lambda device: 0)
    room = kept_graph.Room(0.5, make_backbone().denoiser)
    kept = kept_graph.KeptGraph(torch.arange(2), (0,), room=room)
    weight = torch.ones(2, 4, requires_grad=True)
    with kept.recording(0, torch.device("cpu")):
        scores = (2 * weight).softmax(dim=1)  # which saves its own output
    kept.add(0, scores, torch.ones(()))
    assert room.fits is False
    alive = weakref.ref(scores)
    del scores
    assert alive() is None


def test_a_draw_that_does_not_fit_beside_its_graph_is_drawn_without_it(policy, make_rollouts, monkeypatch):
    decode, sizes = policy.backbone.decode, []

    def scarce(latents):
        sizes.append(len(latents))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(latents)

    monkeypatch.setattr(policy.backbone, "decode", scarce)
    source = with_room(policy, make_rollouts, monkeypatch, 2**40)
    batch = source.next(policy)
    assert sizes == [4, 4] and batch.graph is None and len(batch) == 4
    assert source.next(policy).graph is None
    assert source.state_dict()["sample_batch_size"] == 64 and source.state_dict()["keeps_no_graph"]


def test_images_go_in_passes_where_the_graph_is_of_other_branches(policy, make_rollouts, monkeypatch):
    kept = with_room(policy, make_rollouts, monkeypatch, 2**40, objective=DDPO()).next(policy)
    assert kept.graph.holds(kept.steps)
    of_one_branch = FlowGRPO(kl_weight=0.0, detach_unconditional=True, images_per_pass=2)
    assert {len(part) for part, _ in of_one_branch.split(kept)} == {2}
    assert {len(part) for part, _ in DDPO(images_per_pass=2).split(kept)} == {4}


def test_what_a_graph_takes_grows_with_the_steps_that_have_noise(policy, make_rollouts, monkeypatch):
    def kept(free, **options):
        batch = with_room(policy, make_rollouts, monkeypatch, free, num_steps=8, **options).next(policy)
        return batch.graph.holds(batch.steps)

    enough = next(2**power for power in range(10, 40) if kept(2**power, sde_window={"size": 1}))
    assert not kept(enough)


def test_steps_without_noise_are_drawn_without_a_graph(policy, make_rollouts, monkeypatch):
    live, with_graph = policy.live, []
    monkeypatch.setattr(policy, "live", lambda *args: (with_graph.append(torch.is_grad_enabled()), live(*args))[1])
    make_rollouts(bind=True, keep_graph=True, sde_window={"size": 2, "range": [1, 3]}).next(policy)
    assert with_graph == [False, True, True, False]


def test_a_draw_keeps_a_graph_only_for_a_term_that_learns_from_all_of_it(make_policy, make_rollouts, monkeypatch):
    monkeypatch.setattr(kept_graph, "free_memory", lambda device: 2**40)

    def graph(objective, **options):
        source, seen = make_rollouts(**options), []
        trainer = Trainer(make_policy(), [Term(objective, source, name="term")], steps=1)
        draw = source.next
        monkeypatch.setattr(source, "next", lambda policy: (seen.append(draw(policy)), seen[0])[1])
        trainer.run_step()
        return seen[0].graph

    assert graph(DDPO()) is not None
    assert graph(DDPO(images_per_pass=2)) is None
    assert graph(DDPO(), sample_batch_size=2) is None
    assert graph(DDPO(), graph_memory=0.0) is None
    assert graph(AGSM(group_size=2)) is None


def test_terms_that_share_a_kept_draw_learn_as_without(make_policy, make_rollouts):
    """The first policy gradient uses up the graph, the second computes anew, and AGSM swaps in the EMA in between."""

    def trained(keep_graph):
        policy, source = make_policy(), make_rollouts(keep_graph=keep_graph, images_per_prompt=4)
        terms = [
            Term(AGSM(group_size=2), source, name="agsm", view=BestImages(share=0.5, min_advantage=-5.0)),
            Term(DDPO(), source, name="ddpo", trains=["lora"], every=2),
            Term(FlowGRPO(), source, name="flow_grpo"),
        ]
        trainer = Trainer(policy, terms, steps=3, learning_rate=3e-4)
        metrics = trainer.run_step()
        trainer.train()
        return metrics, policy.parameters(), trainer.state_dict()

    (expected, anew, _), (found, kept, state) = trained(False), trained(True)
    for name in ("agsm", "ddpo", "flow_grpo"):
        assert found[f"{name}/rows" if name == "agsm" else f"{name}/ratio"] > 0
        assert found[f"{name}/grad_norm"] == pytest.approx(expected[f"{name}/grad_norm"], rel=1e-6)
    for name, parameter in anew.items():
        torch.testing.assert_close(kept[name], parameter, rtol=0, atol=1e-5)
    assert all(source["pending"] == [] for source in state["sources"].values())


@pytest.mark.parametrize(
    "options", [{"updates": 2}, {"drawn_by": "ema"}, {"eta": 0.0}], ids=lambda one: next(iter(one))
)
def test_it_is_refused_where_the_draw_is_not_what_is_learned_from(make_rollouts, options):
    with pytest.raises(UserError, match=f"keep_graph: true, but .*`{next(iter(options))}"):
        make_rollouts(keep_graph=True, **options)

"""What the heaviest denoising step carries of a policy gradient: logged, and a warning where it rules."""

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.policy import Policy
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.anomalies import AnomalyWatch, WentWrong
from agsm_rl.training.gradients import largest_share


def figures(share):
    return {"loss": 0.0, "grad_norm": 1.0, "step_share": share, "heaviest_step": 8.0}


def test_the_share_is_the_heaviest_step_s_part_of_the_sum_of_lengths():
    assert largest_share({0: 1.0, 4: 6.0, 7: 3.0}) == {"step_share": pytest.approx(0.6), "heaviest_step": 4.0}


@pytest.mark.parametrize("lengths", [{}, {0: 1.0, 1: 5.0}, {0: 0.0, 1: 0.0, 2: 0.0}, {0: float("nan"), 1: 1.0, 2: 1.0}])
def test_few_steps_and_gradients_of_nothing_have_no_share(lengths):
    assert largest_share(lengths) == {}


def test_the_warning_comes_once_after_three_heavy_steps_in_a_row():
    watch, told = AnomalyWatch(), []
    for step, share in enumerate([0.9, 0.9, 0.4, 0.9, 0.9, 0.9, 0.9, 0.4, 0.9, 0.9, 0.9], start=1):
        watch.begin_step()
        assert watch.term_passes(step, "ddpo", figures(share))
        told += watch.events
    (event,) = told
    assert (event.step, event.watch, event.subject) == (6, "step_share", "ddpo")
    assert "step 8 (the first is 0) carried 90% of its gradient" in event.message and "sde_window" in event.message


def test_a_resumed_watch_counts_on_and_one_of_an_earlier_version_begins_anew():
    watch = AnomalyWatch(step_share="stop")
    for step in (1, 2):
        watch.term_passes(step, "ddpo", figures(0.9))
    resumed, earlier = AnomalyWatch(step_share="stop"), AnomalyWatch(step_share="stop")
    resumed.load_state_dict(watch.state_dict())
    with pytest.raises(WentWrong, match="carried 90%"):
        resumed.term_passes(3, "ddpo", figures(0.9))
    earlier.load_state_dict({key: value for key, value in watch.state_dict().items() if key != "heavy_steps"})
    assert earlier.term_passes(3, "ddpo", figures(0.9))


def test_ignored_is_ignored():
    watch = AnomalyWatch(step_share="ignore")
    for step in range(1, 6):
        watch.term_passes(step, "ddpo", figures(0.9))
    assert not watch.events


def test_a_run_logs_the_share_of_its_gradients(sd3_backbone, make_rollouts):
    policy = Policy(sd3_backbone, {"lora": LoRA(rank=2)})
    source = make_rollouts(bind=True, num_steps=5)
    objective = DDPO()
    trainer = Trainer(policy, [Term(objective, source, name="ddpo")], steps=1)
    batch = source.next(policy)
    parameters = list(policy.parameters().values())
    lengths = {}
    for part, share in objective.split(batch):
        given = torch.autograd.grad(objective.loss(policy, part)[0] * share, parameters, allow_unused=True)
        lengths[part.steps[0]] = float(torch.stack([value.norm() for value in given if value is not None]).norm())
    source.bind("ddpo", 0, trainer.processes)
    metrics = trainer.run_step()
    assert metrics["ddpo/step_share"] == pytest.approx(max(lengths.values()) / sum(lengths.values()), rel=1e-4)
    assert metrics["ddpo/heaviest_step"] == max(lengths, key=lengths.get)


def test_steps_that_are_learned_together_have_no_share(policy, rollouts):
    metrics = Trainer(policy, [Term(DDPO(steps_per_pass=2), rollouts, name="ddpo")], steps=1).run_step()
    assert "ddpo/step_share" not in metrics

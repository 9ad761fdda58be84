"""Processes that share a term's rows unevenly learn what one process learns from all of them."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier

import pytest
import torch
from agsm_rl_rewards.brightness import Brightness

from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.sources.views import NonzeroAdvantages
from agsm_rl.term import Term
from agsm_rl.trainer import Trainer
from agsm_rl.training.processes import Processes
from agsm_rl.training.row_shares import share_of

PROMPTS = ["a red star", "a blue circle", "two green squares"]


class Meeting:
    """Where threads hand each other a tensor, in turns that all of them take."""

    def __init__(self, count):
        self.barrier, self.brought = Barrier(count), [None] * count

    def exchange(self, index, value):
        self.brought[index] = value
        self.barrier.wait()
        brought = list(self.brought)
        self.barrier.wait()
        return brought


class Threaded:
    """Accelerate's interface for processes that are threads of this one."""

    mixed_precision, device = "no", torch.device("cpu")

    def __init__(self, index, meeting):
        self.process_index, self.meeting = index, meeting
        self.num_processes = len(meeting.brought)

    def autocast(self):
        return nullcontext()

    def gather(self, value):
        return torch.cat(self.meeting.exchange(self.process_index, value))

    def reduce(self, value, reduction):
        assert reduction == "mean"
        return torch.stack(self.meeting.exchange(self.process_index, value)).mean(0)


class BrightFor:
    """Brightness for these prompts; all images of the others are worth the same."""

    name, range, differentiable = "bright_for", (0.0, 1.0), False

    def __init__(self, prompts):
        self.prompts = prompts

    def __call__(self, images, prompts):
        varies = torch.tensor([prompt in self.prompts for prompt in prompts])
        return torch.where(varies, Brightness()(images, prompts), torch.full((len(prompts),), 0.5))


@pytest.fixture
def run(make_policy, make_rollouts):
    """The figures and the gradient of one step, as each of `count` processes has them."""

    def run(count, view, prompts):
        meeting = Meeting(count)
        trainers = []
        for index in range(count):
            policy = make_policy()
            generator = torch.Generator().manual_seed(0)
            for parameter in policy.parameters().values():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            source = make_rollouts(
                rewards=[(BrightFor(prompts), 1.0)],
                num_prompts=4,
                images_per_prompt=3,
                guidance=2.0,
                advantages={"by": "group", "std": "global"},
            )
            term = Term(FlowGRPO(kl_weight=0.5, images_per_pass=2), source, name="term", view=view)
            accelerator = Threaded(index, meeting) if count > 1 else None
            trainers.append(Trainer(policy, [term], steps=1, accelerator=accelerator, max_grad_norm=None))

        def learn(trainer):
            try:
                metrics = trainer.run_step()
            except BaseException:
                meeting.barrier.abort()
                raise
            gradient = {name: value.grad for name, value in trainer.parameters.items() if value.grad is not None}
            return metrics, gradient

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(learn, trainers))

    return run


def assert_same(runs, one):
    # A step's share is taken from the lengths of the passes' gradients, and so depends on which rows share a pass.
    by_pass = ("term/step_share", "term/heaviest_step")
    metrics, gradient = one[0]
    wanted = {name: value for name, value in metrics.items() if name not in by_pass}
    for its_metrics, its_gradient in runs:
        found = {name: value for name, value in its_metrics.items() if name not in by_pass}
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert set(its_gradient) == set(gradient)
        for name, value in gradient.items():
            assert (its_gradient[name] - value).norm() <= 1e-4 * value.norm() + 1e-9


@pytest.mark.parametrize(
    ("varies", "rows"),
    # The first process draws the squares and the circle, the second the star and the squares again: 3 images of each.
    [(["a red star"], 0 + 3), (["a red star", "two green squares"], 3 + 6)],
    ids=["none on one process", "fewer on one process"],
)
def test_two_processes_with_different_numbers_of_nonzero_advantages_equal_one(run, varies, rows):
    one, two = (run(count, NonzeroAdvantages(), varies) for count in (1, 2))
    assert one[0][0]["term/rows"] == rows
    assert one[0][0]["term/kl"] > 0
    assert_same(two, one)


def test_all_processes_know_the_names_that_any_of_them_has():
    meeting = Meeting(2)
    with ThreadPoolExecutor(2) as pool:
        asked = [(Processes(Threaded(index, meeting)), names) for index, names in enumerate((["loss", "kl"], []))]
        assert list(pool.map(lambda one: one[0].names(one[1]), asked)) == [["kl", "loss"]] * 2


def test_the_weights_of_uneven_shares_make_the_mean_over_processes_that_over_all_rows():
    meeting = Meeting(2)
    with ThreadPoolExecutor(2) as pool:
        rows = [6, 2]
        shares = list(pool.map(lambda index: share_of(rows[index], Processes(Threaded(index, meeting))), range(2)))
    assert [share.weight for share in shares] == [1.5, 0.5]
    assert [share.total for share in shares] == [8, 8]

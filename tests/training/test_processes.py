"""What a run's processes exchange, what is refused, and how a process that is stuck ends; without starting any."""

import os
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from agsm_rl.cli import launcher
from agsm_rl.errors import UserError
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.processes import EndWhenStuck, Processes, ProcessLost, make_accelerator


class TwoAlike:
    """Accelerate's interface as the first of two processes sees it, where the other has the same as this one."""

    num_processes, process_index = 2, 0
    mixed_precision = "no"
    device = torch.device("cpu")

    def __init__(self):
        self.reduced, self.gathered = [], []

    def autocast(self):
        return nullcontext()

    def reduce(self, value, reduction):
        assert reduction == "mean"
        self.reduced.append(value)
        return value.clone()

    def gather(self, value):
        self.gathered.append(value)
        return torch.cat([value, value])


def test_a_step_exchanges_the_adapters_gradients_and_a_few_numbers(policy, make_pairs, make_rollouts):
    alike = TwoAlike()
    terms = [
        Term(AGSM(group_size=2), make_pairs(), name="agsm"),
        Term(DDPO(), make_rollouts(num_prompts=4), name="ddpo", trains=["lora"]),
    ]
    trainer = Trainer(policy, terms, steps=1, accelerator=alike)
    metrics = trainer.run_step()
    trained = [policy.parameters(names) for names in (None, ["lora"])]
    reached = [{name for name, value in one.items() if value.grad is not None} for one in trained]
    assert reached[0] == set(trained[0])
    # DDPO draws with the positive bank alone.
    positive = sum(value.numel() for name, value in trained[1].items() if ".negative." not in name)
    gradients = sum(value.numel() for value in trained[0].values()) + positive
    figures = sum(name.startswith(("agsm/", "ddpo/")) for name in metrics)
    sizes = [value.numel() for value in alike.reduced]
    # A message of gradients and one of figures a term, whatever the size of the frozen backbone.
    assert len(sizes) == 4 and sum(sizes) <= gradients + figures
    assert sum(sizes[0::2]) == gradients
    # The size and the reward of each of its four images, and how many rows of the data set could not be read.
    assert sum(value.numel() for value in alike.gathered) == 4 + 4 + 1


def test_tensors_of_several_shapes_and_dtypes_are_averaged_in_a_message_a_dtype():
    alike = TwoAlike()
    values = [torch.ones(2, 3), torch.tensor(4.0), torch.full((5,), 2.0, dtype=torch.bfloat16)]
    means = Processes(alike).mean(values)
    assert all(torch.equal(mean, value) for mean, value in zip(means, values, strict=True))
    assert [value.numel() for value in alike.reduced] == [7, 5]


def test_an_exchange_that_fails_says_that_a_process_was_lost():
    class Gone(TwoAlike):
        def gather(self, value):
            raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:3996: Connection reset by peer. This is typically")

    with pytest.raises(ProcessLost, match=r"cannot be reached any more \(.*Connection reset by peer\)"):
        Processes(Gone()).numbers(1.0)


def test_a_batch_that_processes_cannot_share_is_refused_with_what_would_work(policy, make_pairs, make_rollouts):
    three = TwoAlike()
    three.num_processes = 3
    with pytest.raises(UserError, match="batch_size 4 .*among the 3 .*a multiple of 3, or start 1 or 2"):
        Trainer(policy, [Term(AGSM(), make_pairs())], steps=1, accelerator=three)
    with pytest.raises(UserError, match="num_prompts 2 .*among the 3 "):
        Trainer(policy, [Term(DDPO(), make_rollouts())], steps=1, accelerator=three)


def test_groups_that_processes_would_cut_are_refused_before_the_first_step(policy, make_pairs):
    with pytest.raises(UserError, match="agsm: on 2 processes each learns from 2 rows.*multiple of group_size 4"):
        Trainer(policy, [Term(AGSM(group_size=4), make_pairs(), name="agsm")], steps=1, accelerator=TwoAlike())


def test_a_checkpoint_waits_until_the_rollouts_of_all_processes_are_learned_from(policy, make_rollouts):
    term = Term(DDPO(), make_rollouts(updates=2), name="ddpo")
    trainer = Trainer(policy, [term], steps=2, accelerator=TwoAlike())
    pauses = []
    for _ in range(2):
        trainer.run_step()
        pauses.append(trainer.can_pause)
    assert pauses == [False, True]


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"])
def test_what_would_shard_the_model_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match="not supported: the backbone is frozen.*--multi_gpu"):
        make_accelerator()


@pytest.mark.parametrize(("rank", "waits"), [(None, 0), ("0", 0), ("1", launcher.PATIENCE)])
def test_a_mistake_that_all_processes_find_is_told_by_the_first(monkeypatch, rank, waits):
    slept = []
    monkeypatch.setattr(launcher, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    launcher.let_the_first_speak()
    assert sum(slept) == waits


def in_a_child(run):
    """The exit code of a forked process that does this."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_waits_for_a_lost_one_ends_after_a_signal_with_its_message(capfd):
    def stuck():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        with EndWhenStuck(lambda number: f"stuck after {number}", grace=0.0):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    assert in_a_child(stuck) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "agsm-rl: stuck after 15\n"


def test_a_process_that_ends_its_step_in_time_is_left_alone():
    def in_time():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        with EndWhenStuck(lambda number: "stuck", grace=600.0):
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7 if signal.set_wakeup_fd(-1) == -1 else 8)

    assert in_a_child(in_time) == 7

"""How runs are taken and compared."""

import sys

import measure
import pytest
import torch


def test_sides_take_turns_and_each_begins_as_often():
    order = []

    def side(name: str) -> measure.Side:
        return lambda: order.append(name) or measure.Seconds(1.0, 1.0)

    taken = measure.interleave({"a": side("a"), "b": side("b")}, repeats=3, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(runs) for runs in taken.values()] == [3, 3]


def test_a_machine_that_slows_down_half_way_does_not_change_the_ratio():
    ours = [measure.Seconds(wall, wall) for wall in (1.0, 1.0, 5.0, 5.0)]
    other = [measure.Seconds(2 * run.wall, 2 * run.cpu) for run in ours]
    found = measure.compare_seconds(ours, other)
    assert (found["ratio"], found["low"], found["high"]) == (2.0, 2.0, 2.0)
    assert measure.compare_seconds(ours, other, of="ours/other")["ratio"] == 0.5


def test_the_interval_of_a_ratio_holds_it_and_widens_with_noise():
    calm = measure.ratio([1.0, 1.01, 0.99, 1.0, 1.02], [1.0] * 5)
    noisy = measure.ratio([1.0, 2.0, 0.5, 1.0, 1.5], [1.0] * 5)
    for found in (calm, noisy):
        assert found["low"] <= found["ratio"] <= found["high"]
    assert noisy["high"] - noisy["low"] > calm["high"] - calm["low"]


def test_a_worker_answers_until_it_dies():
    answers = "import sys\nfor line in sys.stdin:\n    print([1.5, 2.5], flush=True)\n    sys.exit(3)\n"
    worker = measure.Worker([sys.executable, "-c", answers])
    assert worker.step() == measure.Seconds(1.5, 2.5)
    with pytest.raises(RuntimeError, match="exit code 3"):
        worker.step()


def test_a_cpu_s_attention_is_counted_with_its_backward_pass():
    query, key, value = (torch.randn(1, 2, length, 8, requires_grad=True) for length in (4, 6, 6))

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()

    forward = 2 * 2 * 2 * 4 * 6 * 8  # two products, two heads, a multiplication and an addition each
    assert measure.flops_of(attend) == 3.5 * forward

"""What ceiling.py records of a step, and replays."""

from collections import Counter

import ceiling
import full_size_models
import measure
import pytest
import torch
from torch import nn


def step() -> None:
    """A convolution, a linear layer and attention, with a backward pass to the input alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolution, linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 8)
        for module in (convolution, linear):
            module.requires_grad_(False)
        rows = linear(convolution(torch.randn(2, 4, 8, 8, requires_grad=True))).flatten(2)[:, None]
        nn.functional.scaled_dot_product_attention(rows, rows, rows).sum().backward()


def test_the_replayed_calls_do_the_flops_of_the_step():
    with ceiling.Recorder() as recorder:
        step()
    kinds = ceiling.replay(recorder.calls, "cpu")
    assert sum(kind["flops"] for kind in kinds.values()) == measure.flops_of(step)
    assert {name: kind["calls"] for name, kind in kinds.items() if name != ceiling.OTHER} == {
        "matrix products": 2,
        "convolutions": 2,
        "attention": 2,
    }


def test_a_call_counts_as_often_as_it_is_made_and_once_for_each_layout():
    square = torch.randn(8, 8)
    with ceiling.Recorder() as recorder:
        for right in (square, square, square.T):
            square @ right
    assert sorted(recorder.calls.values()) == [1, 2]


def test_a_tensor_is_made_again_with_its_shape_strides_and_type():
    for tensor in (
        torch.randn(3, 4).T,
        torch.randn(1, 5).expand(3, 5),
        torch.zeros(2, dtype=torch.long),
        torch.ones(()),
    ):
        again = ceiling.made(ceiling.described([tensor])[0])
        assert (again.shape, again.stride(), again.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


def test_a_product_that_cannot_be_replayed_is_an_error():
    call = (torch.ops.aten.mm.default, ceiling.described([torch.ones(2, 3), torch.ones(2, 3)]), ())
    with pytest.raises(RuntimeError):
        ceiling.replay(Counter({call: 1}), "cpu")


def test_a_shallow_pipeline_has_the_widths_of_the_deep_one():
    pipeline = full_size_models.tiny("flux").make()
    before = dict(pipeline.transformer.config)
    full_size_models.make_shallow(pipeline, 1)
    after = pipeline.transformer.config
    assert len(pipeline.transformer.transformer_blocks) == len(pipeline.transformer.single_transformer_blocks) == 1
    changed = {key for key in before if not key.startswith("_") and after[key] != before[key]}
    assert changed == {"num_layers", "num_single_layers"}
    assert pipeline.text_encoder_2.config.num_layers == 1

"""PEFT's layers in a model: what they hold, which of their adapters are active, and how they come off again.

A layer that PEFT has replaced wraps the original module and may hold several named adapters, each of them with tensors
under the same attributes (lora_A, lokr_w1, oft_R, …). With none of its adapters active it returns the original
module's output, unchanged.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's tensor, by PEFT's name: the length of each row of the changed weight."""


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that PEFT has replaced, by name; a layer may wrap another one."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # here and elsewhere: loading PEFT takes seconds

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def layer_parameters(layer: Any, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """An adapter's tensors in a layer, by PEFT's names: lora_A (rank, in), lora_B (out, rank), …"""
    for attribute in dict.fromkeys(layer.adapter_layer_names):
        held = getattr(layer, attribute)
        if adapter in held:
            entry = held[adapter]
            yield attribute, entry if isinstance(entry, nn.Parameter) else entry.weight


def holds(layer: Any, adapter: str) -> bool:
    """Whether an adapter has tensors in a layer."""
    return any(True for _ in layer_parameters(layer, adapter))


def only_adds(layer: Any) -> bool:
    """Whether all adapters in a layer add to its output, so that their order does not matter.

    DoRA rescales the output, and OFT rotates the input.
    """
    return not (getattr(layer, MAGNITUDE, None) or hasattr(layer, "oft_R") or hasattr(layer, "boft_R"))


def set_active(layer: Any, names: list[str]) -> None:
    """PEFT's switch without its side effect on requires_grad: all banks need gradients at once."""
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.set_adapter(names)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def add(model: Any, config: Callable[[], Any], names: Sequence[str]) -> None:
    """Add adapters to a model, all switched off; everyone else's stay as they were. `config` makes PEFT's options."""
    active = [(layer, list(layer.active_adapters)) for _, layer in tuner_layers(model)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are intended
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")  # described among OFT's options
        for name in names:
            model.add_adapter(config(), adapter_name=name)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for _, layer in tuner_layers(model):  # PEFT has just switched everyone else's off
        if holds_any(layer, names):
            set_active(layer, [])
    for layer, before in active:
        set_active(layer, before)


def holds_any(layer: Any, names: Collection[str]) -> bool:
    """Whether one of these adapters has tensors in a layer."""
    return any(holds(layer, name) for name in names)


def remove(model: Any, names: Collection[str]) -> None:
    """Delete adapters, and put the original modules back where no other adapter remains."""
    for name, layer in reversed(tuner_layers(model)):  # the innermost of nested layers first
        for adapter in names:
            if holds(layer, adapter):
                layer.delete_adapter(adapter)
        if not layer._get_available_adapters():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    for adapter in names:
        getattr(model, "peft_config", {}).pop(adapter, None)
    if getattr(model, "peft_config", None) == {}:
        del model.peft_config
        model._hf_peft_config_loaded = False


def apply_by_row(layer: Any, by_row: Sequence[str]) -> list[Any]:
    """Give each row of a layer's input the adapter named for it; returns the hooks, which undo it when removed.

    The adapters that are named must be switched on if the layer is LoRA's, and only the first of them otherwise.
    """
    if hasattr(layer, "lora_A"):
        # PEFT adds up its active adapters for all rows; a row that is not in a bank gets 0 of it.
        return [
            _contribution(layer, name).register_forward_hook(_only(torch.tensor([each == name for each in by_row])))
            for name in dict.fromkeys(by_row)
        ]
    return [layer.register_forward_hook(_replace_rows(by_row), with_kwargs=True)]


def _contribution(layer: Any, adapter: str) -> nn.Module:
    """The module whose output of 0 makes a LoRA adapter's contribution 0: A, or all of DoRA's."""
    module: nn.Module = (
        layer.lora_magnitude_vector[adapter] if adapter in layer.lora_magnitude_vector else (layer.lora_A[adapter])
    )
    return module


def _only(rows: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that puts 0 in the place of all rows of a module's output but these, [B]."""

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * _like(rows, output).to(output.dtype)

    return keep


def _replace_rows(by_row: Sequence[str]) -> Callable[..., Tensor]:
    """A hook that computes a layer's output again for each further adapter, and takes the rows named for it."""
    first, *others = dict.fromkeys(by_row)

    def replace(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        for name in others:
            active = list(layer.active_adapters)
            set_active(layer, [name if each == first else each for each in active])
            try:
                again = layer.forward(*args, **kwargs)
            finally:
                set_active(layer, active)
            output = torch.where(_like(torch.tensor([each == name for each in by_row]), output), again, output)
        return output

    return replace


def _like(rows: Tensor, output: Tensor) -> Tensor:
    """`rows` [B] with the dimensions and the device of an output [B, …]."""
    if len(output) != len(rows):
        raise ValueError(f"{len(rows)} banks for {len(output)} rows")
    return rows.to(output.device).view(-1, *[1] * (output.ndim - 1))

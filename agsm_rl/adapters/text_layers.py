"""The layers of a text encoder that affect the encoded prompts.

SDXL uses the second-to-last hidden state of its first CLIP, so the last layer has no effect and a LoRA there would get
no gradients. Gradients show which layers count, so this works for any model.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from agsm_rl.interfaces import Backbone


def layers_that_act(backbone: Backbone, encoder: str, targets: Sequence[str]) -> tuple[str, ...]:
    """A text encoder's target modules: `targets` (ends of names) if all act, else the names of those that do."""
    model = backbone.text_encoders[encoder]
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            # In a frozen model, nothing requires a gradient before the first of these outputs.
            outputs[name] = output if output.requires_grad else output.requires_grad_()

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for adapter in backbone.adapters:
            stack.enter_context(adapter.using(None))
        for name, module in model.named_modules():
            if name.endswith(tuple(f".{target}" for target in targets)):
                stack.callback(module.register_forward_hook(note(name)).remove)
        cond = backbone.encode_text([" "], gradients=True)
    sums = cond.embeds.sum() + (0 if cond.pooled is None else cond.pooled.sum())
    gradients = torch.autograd.grad(sums, list(outputs.values()), allow_unused=True)
    act = [name for name, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    if len(act) == len(outputs):
        return tuple(targets)
    return tuple(name.removeprefix("text_model.") for name in act)

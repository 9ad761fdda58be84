"""Where a frozen pipeline's parts wait while they are not in use: on the CPU, or, for text encoders, nowhere at all.

diffusers' own offloading moves the denoiser too, which cannot be moved between the forward and the backward pass of a
training. Here the denoiser stays, and the text encoders and the VAE come to the device for their own work only. As in
diffusers, hooks of accelerate say on which device such a part works, so that pipelines run unchanged.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from agsm_rl.errors import UserError

logger = logging.getLogger(__name__)
Reload = Callable[[], Mapping[str, nn.Module]]
"""Loads the parts again, on the CPU, by their names in the pipeline."""
CPU = torch.device("cpu")


class _OnDemand(ModelHook):
    """Calls `come` before the part runs, whoever runs it."""

    def __init__(self, come: Callable[[], None], device: torch.device) -> None:
        self._come, self.execution_device = come, device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring the part to its device."""
        self._come()
        return args, kwargs


class TextEncoders:
    """A pipeline's text encoders, which wait on the CPU between their uses, and whose weights can be freed.

    They stay the same modules throughout: when they are needed after `free`, their weights are loaded into them again.
    """

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device, reload: Reload | None = None) -> None:
        self._parts, self.device, self._reload = dict(parts), device, reload
        self._here = self.freed = False
        self._users = 0
        for part in self._parts.values():
            part.to(CPU)
            add_hook_to_module(part, _OnDemand(self._come, device))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, they are on their device; after the outermost one, on the CPU again."""
        with self.staying():
            self._come()
            yield

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Within the block, they stay on their device once they were needed."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._go()

    def free(self) -> None:
        """Drop the weights; the next use loads them again. Nothing happens where they cannot be loaded again."""
        if self.freed or self._users or self._reload is None:
            return
        for module in _modules(self._parts):
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = _emptied(tensor)
        self._here, self.freed = False, True

    def _come(self) -> None:
        if self.freed:
            self._load_again()
        if not self._here:
            for part in self._parts.values():
                part.to(self.device)
            self._here = True

    def _go(self) -> None:
        if self.device != CPU:
            for part in self._parts.values():
                part.to(CPU)
        self._here = False

    def _load_again(self) -> None:
        assert self._reload is not None
        logger.warning("the text encoders are loaded again: a prompt came that had not been encoded before")
        try:
            loaded = self._reload()
        except UserError as error:
            raise UserError(
                f"backbone.text: a prompt came that had not been encoded before, and the text encoders cannot be "
                f"loaded again: {error} Restore the checkpoint and resume, or write `text: {{keep: offload}}`."
            ) from error
        for name, part in self._parts.items():
            for module, fresh in zip(part.modules(), loaded[name].modules(), strict=True):
                module._parameters.update(fresh._parameters)
                module._buffers.update(fresh._buffers)
            part.requires_grad_(False)
        self.freed = False


def _modules(parts: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    for part in parts.values():
        yield from part.modules()


def _emptied(tensor: torch.Tensor) -> Any:
    """A tensor without data of the same shape and dtype, a parameter if it was one (whatever its class: quantised)."""
    # Not on the meta device: pipelines take the device of any part for their own.
    empty = torch.empty((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def works_on(pipeline: Any, device: torch.device) -> None:
    """Tell a pipeline on which device it works, whatever parts of it wait elsewhere."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and not hasattr(part, "_hf_hook"):
            part._hf_hook = _OnDemand(lambda: None, device)  # its forward stays as it is


def rests_on_cpu(vae: Any, device: torch.device) -> None:
    """Let an autoencoder wait on the CPU between its uses.

    After decoding with gradients it stays on the device until its next use without, because the backward pass needs it.
    """

    def come() -> None:
        vae.to(device)

    def resting(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            come()
            result = work(*args, **options)
            if not torch.is_grad_enabled():
                vae.to(CPU)
            return result

        return run

    vae.to(CPU)
    add_hook_to_module(vae, _OnDemand(come, device))
    vae.encode, vae.decode = resting(vae.encode), resting(vae.decode)

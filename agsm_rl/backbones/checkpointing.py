"""Gradient checkpointing that remembers what each adapter was set to (arXiv 1604.06174 for the idea).

A checkpointed block runs a second time during the backward pass, after the `using(bank)` block around the prediction
has long been left. Recomputed under another bank it would give wrong gradients without any error; with another kind of
attention, an error.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from agsm_rl.interfaces import Adapter


def as_now(
    adapters: Sequence[Adapter], attention: Callable[[], AbstractContextManager[None]]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`'s `context_fn`: the contexts of the forward pass and of its recomputation."""
    return nullcontext(), _all([attention(), *(adapter.recall() for adapter in adapters)])


@contextmanager
def _all(contexts: list[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def enable_gradient_checkpointing(
    denoiser: Any, adapters: Sequence[Adapter], attention: Callable[[], AbstractContextManager[None]]
) -> None:
    """Checkpoint the denoiser's blocks; `adapters` is read at each call, so that later ones are included.

    `attention` gives the context in which predictions choose their kind of attention; it is asked during a prediction.
    diffusers checkpoints whenever gradients are on, in evaluation mode too, so the frozen model stays in that mode.
    """

    def run(block: nn.Module, *args: Any) -> Any:
        # No dropout is active in evaluation mode, so there is no random state to keep.
        return checkpoint(
            block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: as_now(adapters, attention)
        )

    denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=run)

"""Parts of a pipeline that wait on the CPU while the denoiser works, as they count in a rehearsal.

On the meta device nothing is moved: the bytes of such a part are taken off, and put back while it works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from agsm_rl.doctor.memory.meta_device import Rehearsal
from agsm_rl.interfaces import Backbone

ENCODING = "encoding texts"
"""The phase in which text encoders that wait elsewhere are on the device."""


def waiting_sizes(backbone: Backbone) -> dict[str, int]:
    """Bytes of the parts that wait, by their names in the pipeline."""
    return {name: bytes_of(getattr(backbone.pipeline, name)) for name in getattr(backbone, "waiting", ())}


def bytes_of(part: nn.Module) -> int:
    """Bytes of a part's weights and buffers."""
    tensors = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def let_wait(backbone: Backbone, sizes: Mapping[str, int], rehearsal: Rehearsal) -> None:
    """Take waiting parts off the count, and have them come back for their own work, on this instance only."""
    rehearsal.now -= sum(sizes.values())
    vae = sizes.get("vae", 0)
    texts = sum(sizes.values()) - vae
    if texts:
        _during(backbone, "encode_text", texts, rehearsal, phase=ENCODING)
    for method in ("decode", "encode_images") if vae else ():
        _during(backbone, method, vae, rehearsal)


def _during(backbone: Any, method: str, size: int, rehearsal: Rehearsal, *, phase: str | None = None) -> None:
    call: Callable[..., Any] = getattr(backbone, method)

    stays = False

    def coming(*args: Any, **options: Any) -> Any:
        nonlocal stays
        before, rehearsal.phase = rehearsal.phase, phase or rehearsal.phase
        rehearsal.now += 0 if stays else size
        rehearsal.touch()
        result = call(*args, **options)
        # The autoencoder stays for the backward pass: its weights are counted, once, until its next use without one.
        stays = isinstance(result, Tensor) and torch.is_grad_enabled() and result.requires_grad
        rehearsal.now -= 0 if stays else size
        rehearsal.phase = before
        return result

    setattr(backbone, method, coming)

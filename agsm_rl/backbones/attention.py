"""`backbone.attention`: the kernel of the denoiser's attention, by diffusers' name, tried on this machine first.

Newer denoisers ask diffusers for a kernel (`set_attention_backend`). Older ones (U-Nets, SD3, SANA) call torch's
attention themselves: of diffusers' names, they can do those of torch's own kernels.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from agsm_rl.errors import UserError, unknown_name

KERNELS: dict[str, SDPBackend | None] = {
    "native": None,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""diffusers' names of torch's own kernels; None: whichever torch takes."""
Attention = Callable[[], AbstractContextManager[None]]
"""The context in which predictions are made."""


def allowed_attention() -> list[str]:
    """diffusers' names, without kernels that are fetched from the hub."""
    return [backend.value for backend in AttentionBackendName if not backend.value.endswith("_hub")]


def remember_signatures(denoiser: Any) -> None:
    """Spare diffusers from inspecting the signature of each attention's processor at each call.

    In a U-Net with small pictures that takes more time than many of the attention's products. `inspect` returns the
    signature that it finds at a function in place of looking for it.
    """
    for kind in {type(processor) for processor in getattr(denoiser, "attn_processors", {}).values()}:
        call: Any = kind.__call__
        if not hasattr(call, "__signature__"):
            call.__signature__ = inspect.signature(call)


def choose_attention(denoiser: Any, name: str, device: torch.device, *, masked: bool = False) -> Attention:
    """Have the denoiser use a kernel; UserError for one that it cannot use, or that fails on this machine.

    masked: whether the denoiser masks texts' padding, which flash attention cannot. A denoiser on the meta device is
    checked for the device that a run would use.
    """
    if name.endswith("_hub"):
        raise UserError(
            f"backbone.attention: '{name}' is code that diffusers would fetch from the hub and run, which no recipe "
            f"may ask for; install the kernel's package and write one of {', '.join(allowed_attention())}."
        )
    if name not in allowed_attention():
        raise unknown_name("backbone.attention", name, "an attention backend of diffusers", allowed_attention())
    chooses = _lets_choose(denoiser)
    if not chooses and name not in KERNELS:
        raise UserError(
            f"backbone.attention: a {type(denoiser).__name__} calls torch's own attention, so diffusers cannot give it "
            f"'{name}'; write one of {', '.join(KERNELS)}, or leave it out."
        )
    if chooses:
        _set(denoiser, name)
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel = None if chooses else KERNELS[name]

    def attention() -> AbstractContextManager[None]:
        return nullcontext() if kernel is None else sdpa_kernel(kernel)

    def run(query: Tensor) -> Tensor:
        mask = torch.ones(1, 1, 1, query.shape[1], dtype=torch.bool, device=query.device) if masked else None
        if chooses:
            return dispatch_attention_fn(query, query, query, attn_mask=mask, backend=AttentionBackendName(name))
        with attention():
            heads = query.transpose(1, 2)
            return scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)

    _try_out(run, name, device, next(denoiser.parameters()).dtype)
    return attention


def _lets_choose(denoiser: nn.Module) -> bool:
    """Whether some of its attention layers ask diffusers for a kernel."""
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def _set(denoiser: Any, name: str) -> None:
    before, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        denoiser.set_attention_backend(name)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"backbone.attention: {error} Or leave it out for torch's own attention, which needs no package."
        ) from error
    finally:
        _AttentionBackendRegistry.set_active_backend(before)  # that of all other models


def _try_out(run: Callable[[Tensor], Tensor], name: str, device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless attention and its gradient can be computed by this kernel here."""
    dtype = dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16  # weights in few bits
    query = torch.ones(1, 128, 2, 64, device=device, dtype=dtype, requires_grad=True)  # [B, S, heads, D]
    try:
        result = run(query)
    except Exception as error:  # noqa: BLE001 - whatever a kernel fails with
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"backbone.attention: '{name}' does not work on {device.type} in {str(dtype).removeprefix('torch.')} "
            f"({why}); write another one, such as native, another dtype, or leave it out."
        ) from error
    if not result.requires_grad:
        raise UserError(
            f"backbone.attention: '{name}' computes no gradients, so nothing could be trained through it; write flash "
            "or native, or leave it out."
        )
    result.sum().backward()

"""Whether a denoiser is compiled: what looks into its calls, or holds what they computed, has to know."""

from torch import nn


def is_compiled(denoiser: nn.Module) -> bool:
    """Whether `torch.compile` runs it, or some of its modules."""
    return hasattr(denoiser, "_orig_mod") or any(one._compiled_call_impl is not None for one in denoiser.modules())

"""`backbone.compile`: torch.compile for the denoiser, as a whole or block by block, where this machine can compile."""

import logging
from typing import Any

import torch
from torch.utils._triton import has_triton

from agsm_rl import threads
from agsm_rl.errors import UserError, unknown_name

logger = logging.getLogger(__name__)
REGIONAL = "regional"
MODES = ("default", "reduce-overhead", REGIONAL)
RECOMPILE_LIMIT = 32
"""A bank, and gradients on or off, each make a variant; beyond the limit nothing more is compiled."""


def compile_denoiser(denoiser: Any, mode: str, device: torch.device, *, gradient_checkpointing: bool) -> bool:
    """Compile the denoiser; whether it was. UserError for a mode that cannot be had.

    Where nothing can be compiled, such as on a CPU without a C++ compiler, a warning says so.
    """
    if mode not in MODES:
        raise unknown_name("backbone.compile", mode, "a mode of torch.compile", MODES)
    if gradient_checkpointing and mode != REGIONAL:
        raise UserError(
            f"backbone.compile: torch.compile cannot compile a whole denoiser whose blocks are checkpointed; "
            f"write `compile: {REGIONAL}`, which compiles block by block, or leave out compile or checkpointing."
        )
    if mode == REGIONAL and not _repeated(denoiser):
        raise UserError(
            f"backbone.compile: diffusers does not say which blocks of a {type(denoiser).__name__} are repeated, so "
            "they cannot be compiled one by one; write `compile: default`, or leave it out."
        )
    if device.type == "meta":
        _look_for_compiler()
        return False
    mode_of_torch = "default" if mode == REGIONAL else mode
    try:
        torch.compile(torch.nn.functional.silu, mode=mode_of_torch)(torch.ones(64, device=device))
    except Exception as error:  # noqa: BLE001 - whatever a missing or broken compiler fails with
        why = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning("backbone.compile: left out, nothing can be compiled here: %s", why)
        return False
    threads.hold()  # torch would compile everything again for another number of threads
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    if mode == REGIONAL:
        denoiser._repeated_blocks = _repeated(denoiser)
        denoiser.compile_repeated_blocks()
    else:
        denoiser.compile(mode=mode_of_torch)
    return True


def _look_for_compiler() -> None:
    """Warn where a run on this machine would find no compiler; nothing is compiled."""
    if torch.cuda.is_available():
        why = "" if has_triton() else "Triton is not installed, or does not know this GPU"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler  # imports much

        try:
            why = "" if get_cpp_compiler() else "there is no C++ compiler"
        except Exception as error:  # noqa: BLE001 - whatever a missing compiler is reported by
            why = (str(error) or type(error).__name__).splitlines()[0]
    if why:
        logger.warning("backbone.compile: will be left out, nothing can be compiled here: %s", why)


def _repeated(denoiser: Any) -> list[str]:
    """The classes of the blocks that a denoiser consists of: as diffusers names them, or those of its transformer."""
    names = {*(getattr(denoiser, "_repeated_blocks", None) or ())}
    names |= {type(block).__name__ for block in getattr(denoiser, "transformer_blocks", ())}
    return sorted({type(module).__name__ for module in denoiser.modules()} & names)

"""agsm-rl: composable post-training of text-to-image diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agsm_rl.export.attach import attach
    from agsm_rl.policy import Policy
    from agsm_rl.trainer import Term, Trainer

__all__ = ["Policy", "Term", "Trainer", "attach"]
__version__ = "0.1.0"

_HOMES = {"Policy": "policy", "Term": "trainer", "Trainer": "trainer", "attach": "export.attach"}


def __getattr__(name: str) -> Any:
    """Import on first use: `agsm-rl list` must not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"agsm_rl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agsm_rl' has no attribute '{name}'")

"""One run's life, from its folder to its end."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agsm_rl.run.lifecycle import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """`train` on first use: the rooms that read a run's folder need nothing of what trains."""
    if name == "train":
        from agsm_rl.run.lifecycle import train

        return train
    raise AttributeError(f"module 'agsm_rl.run' has no attribute '{name}'")

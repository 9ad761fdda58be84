"""Adapters: small trained parameters on a frozen backbone, switched off without trace."""

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens

__all__ = ["LoRA", "SoftTokens"]

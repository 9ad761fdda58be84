"""Adapters: small trained parameters on a frozen backbone, that leave no trace when switched off."""

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens

__all__ = ["LoRA", "SoftTokens"]

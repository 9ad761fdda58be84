"""Adapters: small trained parameters on a frozen backbone, that leave no trace when switched off."""

from agsm_rl.adapters.loha import LoHa
from agsm_rl.adapters.lokr import LoKr
from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.oft import OFT
from agsm_rl.adapters.soft_tokens import SoftTokens

__all__ = ["OFT", "LoHa", "LoKr", "LoRA", "SoftTokens"]

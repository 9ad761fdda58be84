"""agsm-rl: composable post-training of text-to-image diffusion models."""

from __future__ import annotations

import os
from importlib import import_module

# Nothing is imported here but what Python loads by itself: under `python -m agsm_rl` the current folder, which may be a
# stranger's, is still on the path, and a `typing.py` in it would run. `__main__` takes it off.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agsm_rl.adapters.loha import LoHa
    from agsm_rl.adapters.lokr import LoKr
    from agsm_rl.adapters.lora import LoRA
    from agsm_rl.adapters.oft import OFT
    from agsm_rl.adapters.soft_tokens import SoftTokens
    from agsm_rl.backbones import load_backbone
    from agsm_rl.errors import UserError
    from agsm_rl.export.attach import attach, save_adapters
    from agsm_rl.export.push import push_to_hub
    from agsm_rl.objectives.agsm import AGSM
    from agsm_rl.objectives.anchor import Anchor
    from agsm_rl.objectives.awm import AWM
    from agsm_rl.objectives.crd import CRD
    from agsm_rl.objectives.ddpo import DDPO
    from agsm_rl.objectives.dgpo import DGPO
    from agsm_rl.objectives.diffusion_dpo import DiffusionDPO
    from agsm_rl.objectives.diffusion_nft import DiffusionNFT
    from agsm_rl.objectives.flow_dppo import FlowDPPO
    from agsm_rl.objectives.flow_grpo import FlowGRPO
    from agsm_rl.objectives.grpo_guard import GRPOGuard
    from agsm_rl.objectives.inpo import InPO
    from agsm_rl.objectives.opd import OPD
    from agsm_rl.objectives.reward_backprop import RewardBackprop
    from agsm_rl.objectives.score_matching import ScoreMatching
    from agsm_rl.objectives.softrepa import SoftREPA
    from agsm_rl.objectives.spo import SPO
    from agsm_rl.policy import Objective, Policy, Source, View
    from agsm_rl.recipe.recipe import Recipe
    from agsm_rl.run.lifecycle import train
    from agsm_rl.sources.pairs import Pairs
    from agsm_rl.sources.preferences import Preferences
    from agsm_rl.sources.prompts import Prompts
    from agsm_rl.sources.rollouts import Rollouts
    from agsm_rl.sources.step_preferences import StepPreferences
    from agsm_rl.sources.views import (
        BestAgainstWorst,
        BestImages,
        ChosenImages,
        ImagesAbove,
        NonzeroAdvantages,
        VariedGroups,
    )
    from agsm_rl.term import Term
    from agsm_rl.trainer import Callback, Trainer

__version__ = "0.1.0"

# libgomp reads it when torch is loaded: an idle thread spins for a fraction of a millisecond before it sleeps, not for
# several, in which it would keep other threads, and other processes, from the core. threads.py does the rest.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOMES = {
    "adapters.loha": ("LoHa",),
    "adapters.lokr": ("LoKr",),
    "adapters.lora": ("LoRA",),
    "adapters.oft": ("OFT",),
    "adapters.soft_tokens": ("SoftTokens",),
    "backbones": ("load_backbone",),
    "errors": ("UserError",),
    "export.attach": ("attach", "save_adapters"),
    "export.push": ("push_to_hub",),
    "objectives.agsm": ("AGSM",),
    "objectives.anchor": ("Anchor",),
    "objectives.awm": ("AWM",),
    "objectives.crd": ("CRD",),
    "objectives.ddpo": ("DDPO",),
    "objectives.dgpo": ("DGPO",),
    "objectives.diffusion_dpo": ("DiffusionDPO",),
    "objectives.diffusion_nft": ("DiffusionNFT",),
    "objectives.flow_dppo": ("FlowDPPO",),
    "objectives.flow_grpo": ("FlowGRPO",),
    "objectives.grpo_guard": ("GRPOGuard",),
    "objectives.inpo": ("InPO",),
    "objectives.opd": ("OPD",),
    "objectives.reward_backprop": ("RewardBackprop",),
    "objectives.score_matching": ("ScoreMatching",),
    "objectives.softrepa": ("SoftREPA",),
    "objectives.spo": ("SPO",),
    "policy": ("Objective", "Policy", "Source", "View"),
    "recipe.recipe": ("Recipe",),
    "run.lifecycle": ("train",),
    "sources.pairs": ("Pairs",),
    "sources.preferences": ("Preferences",),
    "sources.prompts": ("Prompts",),
    "sources.rollouts": ("Rollouts",),
    "sources.step_preferences": ("StepPreferences",),
    "sources.views": (
        "BestAgainstWorst",
        "BestImages",
        "ChosenImages",
        "ImagesAbove",
        "NonzeroAdvantages",
        "VariedGroups",
    ),
    "term": ("Term",),
    "trainer": ("Callback", "Trainer"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AGSM",
    "AWM",
    "Anchor",
    "BestAgainstWorst",
    "BestImages",
    "CRD",
    "Callback",
    "ChosenImages",
    "DDPO",
    "DGPO",
    "DiffusionDPO",
    "DiffusionNFT",
    "FlowDPPO",
    "FlowGRPO",
    "GRPOGuard",
    "ImagesAbove",
    "InPO",
    "LoHa",
    "LoKr",
    "LoRA",
    "NonzeroAdvantages",
    "OFT",
    "OPD",
    "Objective",
    "Pairs",
    "Policy",
    "Preferences",
    "Prompts",
    "Recipe",
    "RewardBackprop",
    "Rollouts",
    "SPO",
    "ScoreMatching",
    "SoftREPA",
    "SoftTokens",
    "Source",
    "StepPreferences",
    "Term",
    "Trainer",
    "UserError",
    "VariedGroups",
    "View",
    "attach",
    "load_backbone",
    "push_to_hub",
    "save_adapters",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `agsm-rl list` must not wait for torch."""
    if name in _MODULE_OF:
        return getattr(import_module(f"agsm_rl.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'agsm_rl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

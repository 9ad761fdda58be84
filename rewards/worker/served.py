"""Serves one of our rewards in the workers' frame protocol, over HTTP and for Ray actors."""

from __future__ import annotations

from typing import Any

import torch
from agsm_rl_rewards.worker_side.agsm_rl_worker import Refused

from agsm_rl.errors import UserError


class Served:
    """Passes a frame's images, float32 [B, 3, H, W], to `reward` as tensors; its UserErrors become refusals."""

    images = "numpy"

    def __init__(self, reward: Any) -> None:
        self.reward, self.range = reward, reward.range
        self.takes_metadata = bool(getattr(reward, "takes_metadata", False))

    @torch.no_grad()
    def __call__(self, images: Any, prompts: list[str], *metadata: list[dict[str, Any]]) -> Any:
        try:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return self.reward(torch.from_numpy(images).to(device), prompts, *metadata).detach().float().cpu()
        except UserError as error:
            raise Refused(str(error)) from error

"""One of our rewards behind frames, to be served over HTTP or on a Ray actor."""

from __future__ import annotations

from typing import Any

import torch
from agsm_rl_rewards.worker_side.agsm_rl_worker import Refused

from agsm_rl.errors import UserError
from agsm_rl.training.scoring import scoring_device


class Served:
    """Takes the worker's arrays float32 [B, 3, H, W] to `reward` as tensors; its UserErrors are refusals."""

    images = "numpy"

    def __init__(self, reward: Any) -> None:
        self.reward, self.range = reward, reward.range

    @torch.no_grad()
    def __call__(self, images: Any, prompts: list[str]) -> Any:
        try:
            pixels = torch.from_numpy(images).to(scoring_device())
            return self.reward(pixels, prompts).detach().float().cpu()
        except UserError as error:
            raise Refused(str(error)) from error

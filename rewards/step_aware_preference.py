"""SPO's step-aware preference model (arXiv 2406.04314): PickScore, trained on to judge images that are not finished.

score = exp(logit_scale) · cos(image, prompt), the image being the one that the diffusion model expects at a noisy
state, decoded, and read together with the state's timestep.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

import torch
from agsm_rl_rewards.native import IMAGES_AT_ONCE, NativeReward, Way
from agsm_rl_rewards.preprocessing import normalised, to_tensor
from agsm_rl_rewards.time_conditioned_clip import TimeConditionedCLIP, read_time_conditioned_clip
from agsm_rl_rewards.weights import WeightFile
from PIL import Image
from torch import Tensor

from agsm_rl.errors import unknown_name

Model = Literal["sd-v1-5", "sdxl"]
TIMESTEPS = 1000


class StepAwarePreference(NativeReward):
    """The step-aware preference model's scores [B]; the authors trained one for SD1.5 and one for SDXL.

    The difference between two candidates' scores is the log-odds that the first one is preferred. In
    `step_preferences` it reads each state's timestep; anywhere else it judges finished images, as at timestep 0.

    Args:
        path: The authors' file, a folder that contains it, or a hub id.
        model: The diffusion model whose images it was trained on, which is part of the file's name.
        clip: Folder or hub id of PickScore's CLIP, of which the configuration and the tokenizer are read.
    """

    name = "step_aware_preference"
    range = (-100.0, 100.0)
    licence = "none stated with the weights (the code is MIT; fine-tuned from PickScore)"

    def __init__(
        self,
        *,
        path: str = "SPO-Diffusion-Models/Step-Aware_Preference_Models",
        model: Model = "sd-v1-5",
        clip: str = "yuvalkirstain/PickScore_v1",
        preprocessing: Way = "auto",
    ) -> None:
        super().__init__(preprocessing)
        if model not in get_args(Model):
            raise unknown_name("model", model, "a diffusion model with a released file", get_args(Model))
        self.weights = WeightFile(self.name, "path", path, f"{model}_step-aware_preference_model.bin")
        self.clip_files = [WeightFile(self.name, "clip", clip, name) for name in ("config.json", "tokenizer.json")]
        for file in (self.weights, *self.clip_files):
            file.check()

    def identity(self) -> Hashable:
        """The location of the weights."""
        return (self.weights, *self.clip_files)

    def load(self) -> TimeConditionedCLIP:
        """The time-conditioned CLIP."""
        return read_time_conditioned_clip(self.weights, self.clip_files)

    def pixels(self) -> "ShortestSide":
        """The middle square."""
        return ShortestSide(self.network.image_size)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of finished images."""
        return self._score_at(pixels, prompts, torch.zeros(len(pixels), device=pixels.device))

    def score_states(self, states: Any, prompts: list[str]) -> Tensor:
        """Scores [B] of states (agsm_rl.training.step_scoring.States) by their expected images and timesteps."""
        images: Tensor = states.images
        self.prepare(images.device)
        preprocess = self.pixels().tensor
        timesteps = (states.t.float() * TIMESTEPS).floor()
        parts = zip(images.split(IMAGES_AT_ONCE), timesteps.split(IMAGES_AT_ONCE), strict=True)
        scores = []
        for place, (part, at) in enumerate(parts):
            texts = prompts[place * IMAGES_AT_ONCE : (place + 1) * IMAGES_AT_ONCE]
            scores.append(self._score_at(preprocess(part.float()), texts, at))
        return torch.cat(scores).float()

    def _score_at(self, pixels: Tensor, prompts: list[str], timesteps: Tensor) -> Tensor:
        score: Tensor = self.network.clip.logit_scale.exp() * self.network.cosine_at(pixels, prompts, timesteps)
        return score


class ShortestSide:
    """The shortest side to `size`, bicubic without antialiasing, then the middle square, as the authors do it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def exact(self, pictures: Sequence[Image.Image]) -> Tensor:
        """From pictures."""
        return torch.cat([self.tensor(to_tensor(picture)[None]) for picture in pictures])

    def tensor(self, images: Tensor) -> Tensor:
        """From images [B, 3, H, W] in [0, 1]."""
        scale = self.size / min(images.shape[-2:])
        height, width = (int(side * scale + 0.5) for side in images.shape[-2:])
        resized = torch.nn.functional.interpolate(images, (height, width), mode="bicubic", align_corners=False)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return normalised(resized.clamp(0, 1)[..., top : top + self.size, left : left + self.size])

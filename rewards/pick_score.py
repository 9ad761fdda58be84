"""PickScore (arXiv 2305.01569): a CLIP ViT-H/14 taught which of two images people picked for a prompt.

score = exp(logit_scale) · cos(image, prompt)
"""

from collections.abc import Hashable
from typing import Any

from agsm_rl_rewards.clip_model import clip_files, read_clip
from agsm_rl_rewards.native import NativeReward, Way
from agsm_rl_rewards.preprocessing import ShortestSideCrop
from torch import Tensor


class PickScore(NativeReward):
    """PickScore [B], about 15 to 25 for pictures; the difference of two images' scores is the log-odds of being picked.

    Args:
        path: Folder or hub id of its CLIP.
    """

    name = "pick_score"
    range = (-100.0, 100.0)
    licence = "none stated with the weights (fine-tuned from LAION's CLIP, MIT)"

    def __init__(self, *, path: str = "yuvalkirstain/PickScore_v1", preprocessing: Way = "auto") -> None:
        super().__init__(preprocessing)
        self.files = clip_files(self.name, "path", path, with_text=True)
        for file in self.files:
            file.check()

    def identity(self) -> Hashable:
        """The place of the weights."""
        return tuple(self.files)

    def load(self) -> Any:
        """The CLIP."""
        return read_clip(self.files)

    def pixels(self) -> ShortestSideCrop:
        """As transformers' processor does it."""
        return ShortestSideCrop(self.network.image_size, processor=True)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        return self.network.clip.logit_scale.exp() * self.network.cosine(pixels, prompts)

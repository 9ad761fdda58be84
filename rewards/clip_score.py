"""CLIPScore (arXiv 2104.08718): how well an image fits its prompt, by the cosine of CLIP's features of both.

    score = scale · max(cos(image, prefix + prompt), 0)
Published tables mostly print 100 · cos with ViT-L/14 and no prefix, and so do the defaults. The paper's own metric is
`{path: openai/clip-vit-base-patch32, scale: 2.5, prefix: "A photo depicts "}`.
"""

import math
from collections.abc import Hashable
from typing import Any

from agsm_rl_rewards.clip_model import clip_files, read_clip
from agsm_rl_rewards.native import NativeReward, Way
from agsm_rl_rewards.preprocessing import ShortestSideCrop
from torch import Tensor

from agsm_rl.errors import UserError


class ClipScore(NativeReward):
    """How well an image fits its prompt: CLIPScore [B] in [0, scale].

    Args:
        path: Folder or hub id of a CLIP.
        scale: What a cosine of 1 scores: 100 as in most tables, 2.5 in the paper.
        prefix: Text that stands before each prompt.
    """

    name = "clip_score"
    range = (0.0, 100.0)
    licence = "MIT (OpenAI's CLIP)"

    def __init__(
        self,
        *,
        path: str = "openai/clip-vit-large-patch14",
        scale: float = 100.0,
        prefix: str = "",
        preprocessing: Way = "auto",
    ) -> None:
        super().__init__(preprocessing)
        if not 0 < scale < math.inf:
            raise UserError(f"scale: got {scale}, but it must be above 0 (100 as in most tables, 2.5 as in the paper)")
        self.scale, self.prefix = float(scale), prefix
        self.range = (0.0, self.scale)
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
        return self.scale * self.network.cosine(pixels, [self.prefix + prompt for prompt in prompts]).clamp(min=0)

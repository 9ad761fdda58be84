"""CLIPScore (arXiv 2104.08718): how well an image fits its prompt, by the cosine of CLIP's features of both.

    score = scale · max(cos(image, prefix + prompt), 0)
Most published tables report 100 · cos with ViT-L/14 and no prefix, which is also the default here. The paper's own
metric is `{path: openai/clip-vit-base-patch32, scale: 2.5, prefix: "A photo depicts "}`.
"""

import math

from agsm_rl_rewards.clip_reward import CLIPReward
from agsm_rl_rewards.native import Way
from torch import Tensor

from agsm_rl.errors import UserError


class ClipScore(CLIPReward):
    """How well an image fits its prompt: CLIPScore [B] in [0, scale].

    Args:
        path: Folder or hub id of a CLIP.
        scale: The score of a cosine of 1: 100 as in most tables, 2.5 in the paper.
        prefix: Text put in front of each prompt.
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
        if not 0 < scale < math.inf:
            raise UserError(f"scale: got {scale}, but it must be above 0 (100 as in most tables, 2.5 as in the paper)")
        super().__init__(path, preprocessing)
        self.scale, self.prefix = float(scale), prefix
        self.range = (0.0, self.scale)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        return self.scale * self.network.cosine(pixels, [self.prefix + prompt for prompt in prompts]).clamp(min=0)

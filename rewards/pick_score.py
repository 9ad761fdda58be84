"""PickScore (arXiv 2305.01569): a CLIP ViT-H/14 trained to predict which of two images people prefer for a prompt.

score = exp(logit_scale) · cos(image, prompt) / divisor
"""

import math

from agsm_rl_rewards.clip_reward import CLIPReward
from agsm_rl_rewards.native import Way
from torch import Tensor

from agsm_rl.errors import UserError


class PickScore(CLIPReward):
    """PickScore [B], about 15 to 25 for pictures.

    The difference between two images' scores is the log-odds that the first one is preferred (with `divisor: 1`).

    Args:
        path: Folder or hub id of PickScore's CLIP.
        divisor: Divides the score. Flow-GRPO and DiffusionNFT: 26, which brings pictures' scores below 1.
    """

    name = "pick_score"
    range = (-100.0, 100.0)
    licence = "none stated with the weights (fine-tuned from LAION's CLIP, MIT)"

    def __init__(
        self, *, path: str = "yuvalkirstain/PickScore_v1", divisor: float = 1.0, preprocessing: Way = "auto"
    ) -> None:
        if not 0 < divisor < math.inf:
            raise UserError(f"divisor: got {divisor}, but it must be above 0 and finite (Flow-GRPO: 26)")
        super().__init__(path, preprocessing)
        self.divisor, self.range = divisor, (-100 / divisor, 100 / divisor)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        return self.network.clip.logit_scale.exp() * self.network.cosine(pixels, prompts) / self.divisor

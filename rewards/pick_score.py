"""PickScore (arXiv 2305.01569): a CLIP ViT-H/14 trained to predict which of two images people prefer for a prompt.

score = exp(logit_scale) · cos(image, prompt)
"""

from agsm_rl_rewards.clip_reward import CLIPReward
from agsm_rl_rewards.native import Way
from torch import Tensor


class PickScore(CLIPReward):
    """PickScore [B], about 15 to 25 for pictures.

    The difference between two images' scores is the log-odds that the first one is preferred.

    Args:
        path: Folder or hub id of PickScore's CLIP.
    """

    name = "pick_score"
    range = (-100.0, 100.0)
    licence = "none stated with the weights (fine-tuned from LAION's CLIP, MIT)"

    def __init__(self, *, path: str = "yuvalkirstain/PickScore_v1", preprocessing: Way = "auto") -> None:
        super().__init__(path, preprocessing)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        return self.network.clip.logit_scale.exp() * self.network.cosine(pixels, prompts)

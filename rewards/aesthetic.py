"""The LAION aesthetic predictor (improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE): how pretty an image is.

A linear head of five layers on CLIP ViT-L/14's normalised image feature, fitted to ratings from 1 to 10.
"""

from collections.abc import Hashable
from typing import Any

from agsm_rl_rewards.clip_model import clip_files, read_clip_vision
from agsm_rl_rewards.native import NativeReward, Way
from agsm_rl_rewards.preprocessing import ShortestSideCrop
from agsm_rl_rewards.score_head import ScoreHead
from agsm_rl_rewards.weights import WeightFile, load_whole, read_tensors, same_name
from torch import Tensor, nn

HEAD = "aesthetic-model.pth"
OTHER_SOURCE = (
    "download sac+logos+ava1-l14-linearMSE.pth, the same weights, from "
    "https://github.com/christophschuhmann/improved-aesthetic-predictor"
)


class Predictor(nn.Module):
    """CLIP's image half and the head on top of it."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.vision, self.head = vision, ScoreHead(vision.config.projection_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores [B]."""
        return self.head(nn.functional.normalize(self.vision(pixel_values=pixels).image_embeds, dim=-1))


class Aesthetic(NativeReward):
    """How pretty an image is, whatever the prompt: scores [B], usually 4 to 7.

    Args:
        path: File, folder or hub id of the head's weights.
        clip: Folder or hub id of CLIP ViT-L/14.
    """

    name = "aesthetic"
    range = (-float("inf"), float("inf"))
    licence = "Apache-2.0 (head), MIT (OpenAI's CLIP)"

    def __init__(
        self,
        *,
        path: str = "trl-lib/ddpo-aesthetic-predictor",
        clip: str = "openai/clip-vit-large-patch14",
        preprocessing: Way = "auto",
    ) -> None:
        super().__init__(preprocessing)
        self.head = WeightFile(self.name, "path", path, HEAD, OTHER_SOURCE)
        self.clip = clip_files(self.name, "clip", clip, with_text=False)
        for file in [self.head, *self.clip]:
            file.check()

    def identity(self) -> Hashable:
        """The locations of the weights."""
        return (self.head, *self.clip)

    def load(self) -> Predictor:
        """CLIP's image half with the head."""
        network = Predictor(read_clip_vision(self.clip))
        file = self.head.find()
        tensors = read_tensors(file, reward=self.name)
        load_whole(network.head, tensors, same_name, unused="(?!)", reward=self.name, file=file)
        return network

    def pixels(self) -> ShortestSideCrop:
        """The middle square, as OpenAI's CLIP cuts it; the predictor was fitted with it."""
        return ShortestSideCrop(self.network.vision.config.image_size, processor=False)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        return self.network(pixels)

"""CLIP, loaded from its folder on the hub (config.json, model.safetensors, tokenizer.json); features have length 1."""

from typing import Any

import torch
from agsm_rl_rewards.tokens import Tokens
from agsm_rl_rewards.weights import WeightFile, load_whole, read_tensors, same_name
from torch import Tensor, nn

from agsm_rl.errors import UserError

BUFFERS = r".*\.position_ids"
"""Position ids, which older files contain as well."""
TEXT_HALF = r"text_model\..*|text_projection\.weight|logit_scale"


def clip_files(reward: str, option: str, place: str, *, with_text: bool) -> list[WeightFile]:
    """The files that a reward needs from a CLIP folder or repository."""
    names = ["config.json", "model.safetensors", *(["tokenizer.json"] if with_text else [])]
    return [WeightFile(reward, option, place, name) for name in names]


class CLIPScorer(nn.Module):
    """A CLIP with its tokenizer. CLIP-like rewards are computed from its `cosine`."""

    def __init__(self, clip: Any, tokens: Tokens) -> None:
        super().__init__()
        self.clip, self.tokens = clip, tokens

    @property
    def image_size(self) -> int:
        """Height and width of the input pixels."""
        return int(self.clip.config.vision_config.image_size)

    def cosine(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """The cosine [B] between the features of each image and its text."""
        return (self.image_features(pixels) * self.text_features(texts, pixels.device)).sum(dim=-1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, D] of normalised pixels [B, 3, size, size]."""
        return nn.functional.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def text_features(self, texts: list[str], device: torch.device) -> Tensor:
        """Unit vectors [B, D]; repeated texts are encoded once."""
        different = list(dict.fromkeys(texts))
        ids, _ = self.tokens(different)
        # No mask is needed: attention is causal, and features are read at the first end token.
        features = self.clip.get_text_features(input_ids=ids.to(device)).pooler_output
        return nn.functional.normalize(features, dim=-1)[[different.index(text) for text in texts]]


def read_clip(files: list[WeightFile]) -> CLIPScorer:
    """A CLIP from its three files; UserError unless the file holds exactly the model's tensors."""
    from transformers import CLIPConfig, CLIPModel

    config_file, weights, tokenizer = (file.find() for file in files)
    config = CLIPConfig.from_json_file(str(config_file))
    check_clip(config, files[0])
    clip: Any = CLIPModel(config)
    _fill(clip, weights, files[1].reward, unused=BUFFERS)
    length = config.text_config.max_position_embeddings
    return CLIPScorer(clip, Tokens(tokenizer, length=length, reward=files[2].reward))


def read_clip_vision(files: list[WeightFile]) -> Any:
    """The image half of a CLIP (a CLIPVisionModelWithProjection) from a folder that holds both halves."""
    from transformers import CLIPConfig, CLIPVisionModelWithProjection

    config_file, weights = (file.find() for file in files)
    config = CLIPConfig.from_json_file(str(config_file))
    check_clip(config, files[0])
    config.vision_config.projection_dim = config.projection_dim
    vision = CLIPVisionModelWithProjection(config.vision_config)
    _fill(vision, weights, files[1].reward, unused=f"{BUFFERS}|{TEXT_HALF}")
    return vision


def check_clip(config: Any, file: WeightFile) -> None:
    """UserError unless the configuration is a CLIP's."""
    if config.model_type != "clip":
        raise UserError(f"reward '{file.reward}': {file.place} holds a model of type '{config.model_type}', not a CLIP")


def _fill(network: Any, file: Any, reward: str, *, unused: str) -> None:
    load_whole(network, read_tensors(file, reward=reward), same_name, unused=unused, reward=reward, file=file)

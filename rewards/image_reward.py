"""ImageReward (arXiv 2304.05977): a BLIP trained on experts' rankings of images for a prompt; 0 is average, ±2 a lot.

    reward = (head(first text token, after cross-attention to the image) − 0.167…) / 1.033…
The official weights are loaded into transformers' BLIP and a head of five linear layers.
"""

import re
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from agsm_rl_rewards.architecture import Sizes, with_changes
from agsm_rl_rewards.native import NativeReward, Way
from agsm_rl_rewards.preprocessing import ShortestSideCrop
from agsm_rl_rewards.score_head import ScoreHead
from agsm_rl_rewards.tokens import Tokens
from agsm_rl_rewards.weights import WeightFile, load_whole, read_tensors, unchanged
from torch import Tensor, nn

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Statistics of the head's scores over the training data, from the official code."""
PROMPT_LENGTH = 35
PUBLISHED: Sizes = {
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "image_size": 224,
    },
    "text": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        # transformers' default, 8, would load, and score wrongly.
        "num_attention_heads": 12,
        "vocab_size": 30524,
        "max_position_embeddings": 512,
    },
}

_EMBEDDINGS = {
    "class_embedding": "cls_token",
    "position_embedding": "pos_embed",
    "patch_embedding.weight": "patch_embed.proj.weight",
    "patch_embedding.bias": "patch_embed.proj.bias",
}
_IN_A_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
UNUSED = r"blip\.(vision|text)_proj\..*|.*\.position_ids"
"""BLIP's contrastive projections, which the reward does not use, and position ids."""


def official_place(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The name of our network's tensor in the official file."""
    part, _, rest = key.partition(".")
    if part == "head":
        return f"mlp.{rest}", unchanged
    if part == "text":
        return f"blip.text_encoder.{rest}", unchanged
    start = "blip.visual_encoder."
    if rest.startswith("embeddings."):
        return start + _EMBEDDINGS[rest.removeprefix("embeddings.")], unchanged
    if rest.startswith("post_layernorm."):
        return start + rest.replace("post_layernorm", "norm"), unchanged
    match = _LAYER.fullmatch(rest)
    assert match is not None, key
    layer, inner, kind = match.groups()
    return f"{start}blocks.{layer}.{_IN_A_LAYER[inner]}.{kind}", unchanged


class BlipScorer(nn.Module):
    """BLIP's image encoder, its text encoder with cross-attention, and the head."""

    def __init__(self, sizes: Sizes) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        text, width = sizes["text"], sizes["vision"]["hidden_size"]
        self.vision: Any = BlipVisionModel(BlipVisionConfig(**sizes["vision"], layer_norm_eps=1e-6))
        # "is_decoder" adds the cross-attention; each call sets it to False, so that text is read in both directions.
        begin = text["vocab_size"] - 2  # [DEC], never used; transformers warns about an id beyond the vocabulary
        config = BlipTextConfig(**text, encoder_hidden_size=width, is_decoder=True, bos_token_id=begin)
        self.text: Any = BlipTextModel(config, add_pooling_layer=False)
        self.head = ScoreHead(text["hidden_size"])
        self.tokens: Tokens | None = None

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards [B] of normalised pixels [B, 3, size, size] for token ids and their mask [B, L]."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        seen = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        text = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=seen,
            is_decoder=False,
        )
        return (self.head(text.last_hidden_state[:, 0]) - MEAN) / STD


def read_image_reward(file: Path, sizes: Sizes, *, reward: str) -> BlipScorer:
    """The network with an official file's weights."""
    network = BlipScorer(sizes)
    load_whole(network, read_tensors(file, reward=reward), official_place, unused=UNUSED, reward=reward, file=file)
    return network


class ImageReward(NativeReward):
    """What experts prefer, given the prompt: ImageReward scores [B]; 0 is average, ±2 a lot.

    Prompts are truncated to 35 tokens, as in the official package.

    Args:
        path: File, folder or hub id of the weights.
        tokenizer: Folder or hub id with the tokenizer.json of bert-base-uncased.
        architecture: Sizes that differ from the published ones, for your own weights: {vision: {…}, text: {…}}.
    """

    name = "image_reward"
    range = (-float("inf"), float("inf"))
    licence = "Apache-2.0"

    def __init__(
        self,
        *,
        path: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        architecture: Mapping[str, Mapping[str, Any]] | None = None,
        preprocessing: Way = "auto",
    ) -> None:
        super().__init__(preprocessing)
        self.sizes = with_changes(PUBLISHED, architecture)
        self.weights = WeightFile(self.name, "path", path, "ImageReward.pt")
        self.tokenizer = WeightFile(self.name, "tokenizer", tokenizer, "tokenizer.json")
        for file in (self.weights, self.tokenizer):
            file.check()

    def identity(self) -> Hashable:
        """The locations of the files, and the sizes."""
        return self.weights, self.tokenizer, repr(self.sizes)

    def load(self) -> BlipScorer:
        """BLIP with the official weights."""
        network = read_image_reward(self.weights.find(), self.sizes, reward=self.name)
        file = self.tokenizer.find()
        network.tokens = Tokens(file, length=PROMPT_LENGTH, reward=self.name, to_length=True)
        return network

    def pixels(self) -> ShortestSideCrop:
        """The middle square, as OpenAI's CLIP cuts it."""
        return ShortestSideCrop(self.sizes["vision"]["image_size"], processor=False)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B]."""
        ids, mask = self.network.tokens(prompts)
        return self.network(pixels, ids.to(pixels.device), mask.to(pixels.device))

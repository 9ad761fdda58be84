"""A CLIP whose image half reads a timestep, as SPO's step-aware preference model has it (arXiv 2406.04314).

Each layer of the image half is modulated by the timestep's embedding as DiT's blocks are (arXiv 2212.09748): what
enters attention and the MLP is scaled and shifted, what leaves them is gated, and so is the pooled feature shifted and
scaled. The names of all tensors are those of the released files, after `model.`.
"""

import math
from typing import Any

import torch
from agsm_rl_rewards.clip_model import CLIPScorer, check_clip
from agsm_rl_rewards.tokens import Tokens
from agsm_rl_rewards.weights import WeightFile, load_whole, read_tensors, unchanged
from torch import Tensor, nn

FREQUENCIES = 256
"""Sines and cosines by which a timestep is embedded."""
BUFFERS = r"model\..*\.position_ids"


class TimeConditionedCLIP(CLIPScorer):
    """CLIP's features, those of images at timesteps."""

    def __init__(self, clip: Any, tokens: Tokens) -> None:
        super().__init__(clip, tokens)
        width = clip.config.vision_config.hidden_size
        for layer in clip.vision_model.encoder.layers:
            layer.adaLN_modulation = _modulation(width, 6)
        clip.vision_model.adaLN_modulation = _modulation(width, 2)
        clip.t_embedder = nn.Module()
        clip.t_embedder.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def cosine_at(self, pixels: Tensor, texts: list[str], timesteps: Tensor) -> Tensor:
        """The cosine [B] between the features of each image, at its timestep [B] of 1,000, and its text."""
        features = self.image_features_at(pixels, timesteps)
        return (features * self.text_features(texts, pixels.device)).sum(dim=-1)

    def image_features_at(self, pixels: Tensor, timesteps: Tensor) -> Tensor:
        """Unit vectors [B, D] of normalised pixels [B, 3, size, size] at timesteps [B]."""
        vision = self.clip.vision_model
        time = self.clip.t_embedder.mlp(embedded(timesteps.to(pixels)))
        states = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer in vision.encoder.layers:
            states = _layer(layer, states, time[:, None])
        shift, scale = vision.adaLN_modulation(time).chunk(2, dim=-1)
        pooled = vision.post_layernorm(states[:, 0]) * (1 + scale) + shift
        return nn.functional.normalize(self.clip.visual_projection(pooled), dim=-1)


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def embedded(timesteps: Tensor) -> Tensor:
    """Cosines, then sines, of the timesteps [B] at 128 frequencies from 1 down to almost 1/10,000, [B, 256]."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(timesteps)


def _layer(layer: Any, states: Tensor, time: Tensor) -> Tensor:
    """One layer of the image half for states [B, tokens, D] and the timesteps' embeddings [B, 1, D]."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = layer.adaLN_modulation(time).chunk(6, dim=-1)
    read = layer.layer_norm1(states) * (1 + scale) + shift
    states = states + gate * layer.self_attn(hidden_states=read, attention_mask=None)[0]
    read = layer.layer_norm2(states) * (1 + scale_mlp) + shift_mlp
    attended: Tensor = states + gate_mlp * layer.mlp(read)
    return attended


def read_time_conditioned_clip(weights: WeightFile, clip_files: list[WeightFile]) -> TimeConditionedCLIP:
    """The model of a released file; `clip_files` are a CLIP's config.json and tokenizer.json, which it lacks."""
    from transformers import CLIPConfig, CLIPModel

    config_file, tokenizer = (file.find() for file in clip_files)
    config = CLIPConfig.from_json_file(str(config_file))
    check_clip(config, clip_files[0])
    tokens = Tokens(tokenizer, length=config.text_config.max_position_embeddings, reward=weights.reward)
    scorer = TimeConditionedCLIP(CLIPModel(config), tokens)
    file = weights.find()
    load_whole(
        scorer.clip,
        read_tensors(file, reward=weights.reward),
        lambda key: (f"model.{key}", unchanged),
        unused=BUFFERS,
        reward=weights.reward,
        file=file,
    )
    return scorer

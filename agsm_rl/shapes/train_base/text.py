"""The second stage: tokenizers, and text encoders that are trained contrastively and then frozen.

An encoder never learns what a reliability cue means (cues are drawn at random here), but every word stays readable at
its own place, and padding says nothing. What a denoiser makes of a cue therefore comes in through the cue's own token,
and soft tokens, which cannot change other tokens, can do the same.
"""

import json
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from agsm_rl.shapes.scenes import Requirement, Scene
from agsm_rl.shapes.train_base.autoencoder import to_model_range
from agsm_rl.shapes.train_base.stages import Settings, render, run_stage
from agsm_rl.shapes.worlds import SHAPES, World

TEXT_LENGTH = SHAPES.text_length
TEXT_WIDTH = 96
T5_WIDTH = 2 * TEXT_WIDTH
"""SD3 pads both CLIPs' states, side by side, to T5's width."""
SHARED = 128
"""Dimensions of the space in which captions and images are compared."""


def make_tokenizer(world: World = SHAPES) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the world's words; any other text falls back to bytes."""
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    bpe.train_from_iterator([" ".join(world.vocabulary())], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    words = list(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=world.text_length)


def make_t5_tokenizer(world: World = SHAPES) -> T5TokenizerFast:
    """A T5 tokenizer of the world's words; any other text falls back to letters."""
    words = list(dict.fromkeys(f"▁{word}" for word in world.vocabulary()))
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [*words, "▁", *letters]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -1.0 if piece in words else -10.0) for piece in pieces]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=world.text_length)


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids [B, S] of the tokenizer's length, padded as the pipelines pad."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


@dataclass(frozen=True)
class Read:
    """What an encoder makes of token ids [B, S]: `states` [B, S, D] as a denoiser gets them, `pooled` [B, SHARED]."""

    states: Tensor
    pooled: Tensor
    words: Tensor
    """Which tokens are words (or the start), [B, S]."""
    padding: Tensor
    """Which tokens are nothing but padding, [B, S]."""


class Reader(nn.Module):
    """A text encoder in training."""

    encoder: Any
    width: int

    @abstractmethod
    def forward(self, ids: Tensor) -> Read:
        """Read a batch of captions."""


class LastStates(Reader):
    """CLIP as SD1.5 reads it: the last layer's states."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.width, self.end = TEXT_WIDTH, tokenizer.eos_token_id
        self.encoder = CLIPTextModel(_clip_config(tokenizer, layers=3))
        self.project = nn.Linear(TEXT_WIDTH, SHARED, bias=False)

    def forward(self, ids: Tensor) -> Read:
        """The pooled embedding is projected by a layer that is thrown away."""
        found = self.encoder(ids)
        return Read(found.last_hidden_state, self.project(found.pooler_output), *_clip_places(ids, self.end))


class PenultimateStates(Reader):
    """CLIP as SDXL and SD3 read it: the states before the last layer, and its own projected embedding."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.width, self.end = TEXT_WIDTH, tokenizer.eos_token_id
        self.encoder = CLIPTextModelWithProjection(_clip_config(tokenizer, layers=4))

    def forward(self, ids: Tensor) -> Read:
        """The pooled embedding is the one that the denoiser gets."""
        found = self.encoder(ids, output_hidden_states=True)
        return Read(found.hidden_states[-2], found.text_embeds, *_clip_places(ids, self.end))


class T5States(Reader):
    """T5 as SD3 reads it: its last states; padding takes part, as no mask is given."""

    def __init__(self, tokenizer: T5TokenizerFast) -> None:
        super().__init__()
        self.width, self.pad = T5_WIDTH, tokenizer.pad_token_id
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        self.encoder = T5EncoderModel(config)
        self.project = nn.Linear(T5_WIDTH, SHARED, bias=False)

    def forward(self, ids: Tensor) -> Read:
        """The mean over the words stands for the caption; its projection is thrown away."""
        states = self.encoder(ids).last_hidden_state
        padding = ids == self.pad
        words = ~padding
        share = words / words.sum(1, keepdim=True)
        return Read(states, self.project((share[:, :, None] * states).sum(1)), words, padding)


def _clip_config(tokenizer: CLIPTokenizer, *, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        hidden_act="quick_gelu",
        projection_dim=SHARED,
    )


def _clip_places(ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    return ids != end, (ids == end).cumsum(1) > 1


class ImageTower(nn.Sequential):
    """The other half of the contrastive training; thrown away afterwards."""

    def __init__(self) -> None:
        channels = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for wide, narrow in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(wide, narrow, 3, stride=2, padding=1), nn.GroupNorm(8, narrow), nn.SiLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(512, SHARED))


def contrasting_scenes(settings: Settings, count: int) -> list[Scene]:
    """`count` pairs of scenes, one after the other, that differ as a right caption differs from a careless one.

    They are the text encoders' hard negatives.
    """
    rng, world = np.random.default_rng((settings.seed, 2)), settings.world
    scenes: list[Scene] = []
    while len(scenes) < 2 * count:
        first = world.draw_requirement(rng)
        second = world.wrong_requirement(first)
        if world.can_be_seen(second):
            scenes += [world.draw_scene(rng, first), world.draw_scene(rng, second)]
    return scenes


def train_text_encoder(settings: Settings, work: Path, name: str, reader: type[Reader], tokenizer: Any) -> Any:
    """CLIP's contrastive objective (arXiv 2103.00020) with hard negatives; cues are random and mean nothing yet.

    `name` is the stage's and seeds it. The frozen encoder.
    """
    torch.manual_seed(settings.seed + sum(name.encode()))
    student = reader(tokenizer)
    model = nn.ModuleDict({"student": student, "tower": ImageTower(), "read": nn.Linear(student.width, len(tokenizer))})
    temperature = nn.Parameter(torch.tensor(2.5))
    model.register_parameter("temperature", temperature)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 300, settings.text_steps)
    scenes: list[Scene] = []
    world = settings.world

    def caption(scene: Scene, rng: np.random.Generator) -> str:
        text = world.describe(scene.requirement, rng)
        return f"{text}, {rng.choice(world.cues)}" if rng.random() < 0.6 else text

    def step(number: int) -> dict[str, float]:
        if not scenes:  # drawn when first needed: a finished stage does not need them again
            scenes.extend(contrasting_scenes(settings, settings.scenes // 6))
        rng = np.random.default_rng((settings.seed, 3, number))
        first = 2 * rng.choice(len(scenes) // 2, 96, replace=False)
        chosen = np.concatenate([first, first + 1])
        ids = tokenize(tokenizer, [caption(scenes[index], rng) for index in chosen])
        found = student(ids)
        text = F.normalize(found.pooled, dim=-1)
        # Each word must be readable where it stands, also a cue that the sentence as a whole ignores; and padding must
        # say nothing: otherwise a denoiser reads whole sentences off it, and no single token has a hold on that.
        reading = F.cross_entropy(model["read"](found.states[found.words]), ids[found.words])
        padding = found.states[found.padding]
        spread = (padding - padding.mean(0)).square().mean()
        images = render([scenes[index] for index in chosen], world)
        seen = F.normalize(model["tower"](to_model_range(images)), dim=-1)
        logits = temperature.exp().clamp(max=100) * text @ seen.T
        # Two scenes with the same requirement are both right; do not set one against the other.
        same = _same([scenes[index].requirement for index in chosen])
        logits = logits.masked_fill(same & ~torch.eye(len(chosen), dtype=torch.bool), -1e4)
        labels = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        (loss + reading + spread).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        accuracy = (logits.argmax(1) == labels).float().mean()
        figures = {"loss": loss, "accuracy": accuracy, "reading": reading, "spread": spread}
        return {name: value.item() for name, value in figures.items()}

    run_stage(name, work, settings.text_steps, {"model": model, "optimizer": optimizer, "schedule": schedule}, step)
    return student.encoder.requires_grad_(False).eval()


def without_projection(encoder: CLIPTextModelWithProjection) -> CLIPTextModel:
    """The same encoder as SDXL's first one is stored: without the projected embedding, which it does not use."""
    plain = CLIPTextModel(encoder.config)
    plain.load_state_dict(encoder.text_model.state_dict())
    return plain.requires_grad_(False).eval()


def _same(requirements: list[Requirement]) -> Tensor:
    names = {requirement: index for index, requirement in enumerate(dict.fromkeys(requirements))}
    index = torch.tensor([names[requirement] for requirement in requirements])
    return index[:, None] == index[None]

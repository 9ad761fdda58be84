"""Weight files of each native reward in its official layout, tiny and random, so that no test needs real ones."""

from pathlib import Path
from typing import Any

import torch
from agsm_rl_rewards.aesthetic import Aesthetic
from agsm_rl_rewards.clip_score import ClipScore
from agsm_rl_rewards.hpsv2 import HPSv2
from agsm_rl_rewards.image_reward import ImageReward
from agsm_rl_rewards.pick_score import PickScore
from agsm_rl_rewards.step_aware_preference import StepAwarePreference
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from agsm_rl.shapes.train_base.text import make_tokenizer

HEADS, TEXT_HEADS = 4, 6
CLIP_VOCABULARY = len(make_tokenizer())
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "star", "circle", "two", "squares", "&", ";"]
HPSV2_SIZES: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "patch_size": 14,
        "image_size": 28,
    },
    "text": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "vocab_size": CLIP_VOCABULARY,
        "max_position_embeddings": 12,
    },
    "shared": {"projection_dim": 16},
}
IMAGE_REWARD_SIZES: dict[str, dict[str, Any]] = {
    "vision": HPSV2_SIZES["vision"] | {"patch_size": 16, "image_size": 32},
    "text": {
        "hidden_size": 36,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": TEXT_HEADS,
        "vocab_size": 40,
        "max_position_embeddings": 36,
    },
}


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Seeded normal weights, large enough for the scores to differ."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw) * (0.25 if len(shape) != 1 else 0.1)
        + float(len(shape) == 1 and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def open_clip_weights(sizes: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """OpenCLIP's names."""
    vision, text, shared = sizes["vision"], sizes["text"], sizes["shared"]["projection_dim"]
    width, patch = vision["hidden_size"], vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (text["max_position_embeddings"], text["hidden_size"]),
        "text_projection": (text["hidden_size"], shared),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + (vision["image_size"] // patch) ** 2, width),
        "visual.proj": (width, shared),
        "visual.conv1.weight": (width, 3, patch, patch),
        "token_embedding.weight": (text["vocab_size"], text["hidden_size"]),
        **norm("visual.ln_pre", width),
        **norm("visual.ln_post", width),
        **norm("ln_final", text["hidden_size"]),
    }
    for start, part in (("visual.", vision), ("", text)):
        for layer in range(part["num_hidden_layers"]):
            name, d, inner = f"{start}transformer.resblocks.{layer}", part["hidden_size"], part["intermediate_size"]
            shapes |= {f"{name}.attn.in_proj_weight": (3 * d, d), f"{name}.attn.in_proj_bias": (3 * d,)}
            shapes |= linear(f"{name}.attn.out_proj", d, d) | norm(f"{name}.ln_1", d) | norm(f"{name}.ln_2", d)
            shapes |= linear(f"{name}.mlp.c_fc", inner, d) | linear(f"{name}.mlp.c_proj", d, inner)
    return filled(shapes)


def head_shapes(start: str, width: int) -> dict[str, tuple[int, ...]]:
    sides = (width, 1024, 128, 64, 16, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (before, after) in zip((0, 2, 4, 6, 7), zip(sides, sides[1:], strict=False), strict=True):
        shapes |= linear(f"{start}{layer}", after, before)
    return shapes


def image_reward_weights(sizes: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The official package's names."""
    vision, text = sizes["vision"], sizes["text"]
    d, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    start = "blip.visual_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{start}cls_token": (1, 1, d),
        f"{start}pos_embed": (1, 1 + (vision["image_size"] // patch) ** 2, d),
        f"{start}patch_embed.proj.weight": (d, 3, patch, patch),
        f"{start}patch_embed.proj.bias": (d,),
        **norm(f"{start}norm", d),
    }
    for layer in range(vision["num_hidden_layers"]):
        name = f"{start}blocks.{layer}"
        shapes |= norm(f"{name}.norm1", d) | linear(f"{name}.attn.qkv", 3 * d, d) | linear(f"{name}.attn.proj", d, d)
        shapes |= norm(f"{name}.norm2", d) | linear(f"{name}.mlp.fc1", inner, d) | linear(f"{name}.mlp.fc2", d, inner)
    t, inner, start = text["hidden_size"], text["intermediate_size"], "blip.text_encoder."
    shapes |= {
        f"{start}embeddings.word_embeddings.weight": (text["vocab_size"], t),
        f"{start}embeddings.position_embeddings.weight": (text["max_position_embeddings"], t),
        **norm(f"{start}embeddings.LayerNorm", t),
    }
    for layer in range(text["num_hidden_layers"]):
        name = f"{start}encoder.layer.{layer}"
        for part, seen in (("attention", t), ("crossattention", d)):
            shapes |= linear(f"{name}.{part}.self.query", t, t) | linear(f"{name}.{part}.self.key", t, seen)
            shapes |= linear(f"{name}.{part}.self.value", t, seen) | linear(f"{name}.{part}.output.dense", t, t)
            shapes |= norm(f"{name}.{part}.output.LayerNorm", t)
        shapes |= linear(f"{name}.intermediate.dense", inner, t) | linear(f"{name}.output.dense", t, inner)
        shapes |= norm(f"{name}.output.LayerNorm", t)
    shapes |= linear("blip.vision_proj", 8, d) | linear("blip.text_proj", 8, t) | head_shapes("mlp.layers.", t)
    numbered = {f"{start}embeddings.position_ids": torch.arange(text["max_position_embeddings"])[None]}
    return filled(shapes) | numbered


def save_clip_tokenizer(folder: Path) -> None:
    """The shapes world's CLIP tokenizer."""
    make_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))


def save_bert_tokenizer(folder: Path) -> None:
    """A few words, with BERT's marks at both ends."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(BERT_WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))


def save_clip(folder: Path) -> Path:
    """A CLIP's folder, written by transformers, with its tokenizer."""
    text = {key: value for key, value in HPSV2_SIZES["text"].items() if key != "vocab_size"}
    end = CLIP_VOCABULARY - 1
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            **text, vocab_size=CLIP_VOCABULARY, eos_token_id=end, bos_token_id=end - 1, pad_token_id=end
        ).to_dict(),
        vision_config=CLIPVisionConfig(**HPSV2_SIZES["vision"]).to_dict(),
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)  # whose cosines are positive for most of the tests' pictures, and negative for one
        clip = CLIPModel(config)
        for parameter in clip.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    clip.save_pretrained(folder)
    save_clip_tokenizer(folder)
    return folder


def save_hpsv2(folder: Path, version: str = "2.1") -> dict[str, Any]:
    """The options of a tiny HPSv2."""
    folder.mkdir(exist_ok=True)
    name = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}[version]
    torch.save({"state_dict": open_clip_weights(HPSV2_SIZES)}, folder / name)
    save_clip_tokenizer(folder)
    return {"version": version, "path": str(folder), "tokenizer": str(folder), "architecture": HPSV2_SIZES}


def save_image_reward(folder: Path) -> dict[str, Any]:
    """The options of a tiny ImageReward."""
    folder.mkdir(exist_ok=True)
    torch.save(image_reward_weights(IMAGE_REWARD_SIZES), folder / "ImageReward.pt")
    save_bert_tokenizer(folder)
    return {"path": str(folder), "tokenizer": str(folder), "architecture": IMAGE_REWARD_SIZES}


def save_aesthetic(folder: Path) -> dict[str, Any]:
    """The options of a tiny aesthetic predictor."""
    save_clip(folder / "clip")
    head = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(filled(head_shapes("layers.", 16)), head)
    return {"path": str(head), "clip": str(folder / "clip")}


def modulation_shapes(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """What SPO's preference model adds to CLIP, in its file's names."""
    start, shapes = "model.vision_model", {}
    for layer in range(layers):
        shapes |= linear(f"{start}.encoder.layers.{layer}.adaLN_modulation.1", 6 * width, width)
    shapes |= linear(f"{start}.adaLN_modulation.1", 2 * width, width)
    return shapes | linear("model.t_embedder.mlp.0", width, 256) | linear("model.t_embedder.mlp.2", width, width)


def save_step_aware_preference(folder: Path) -> dict[str, Any]:
    """The options of a tiny step-aware preference model."""
    from safetensors.torch import load_file

    clip = load_file(save_clip(folder / "clip") / "model.safetensors")
    vision = HPSV2_SIZES["vision"]
    added = filled(modulation_shapes(vision["hidden_size"], vision["num_hidden_layers"]))
    tensors = {f"model.{name}": tensor for name, tensor in clip.items()} | added
    torch.save(tensors, folder / "sd-v1-5_step-aware_preference_model.bin")
    return {"path": str(folder), "clip": str(folder / "clip")}


def save_clip_options(folder: Path) -> dict[str, Any]:
    """The options of a tiny CLIPScore or PickScore."""
    return {"path": str(save_clip(folder))}


TINY: dict[str, tuple[type[Any], Any]] = {
    "hpsv2": (HPSv2, save_hpsv2),
    "image_reward": (ImageReward, save_image_reward),
    "pick_score": (PickScore, save_clip_options),
    "clip_score": (ClipScore, save_clip_options),
    "step_aware_preference": (StepAwarePreference, save_step_aware_preference),
    "aesthetic": (Aesthetic, save_aesthetic),
}

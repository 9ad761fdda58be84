"""The reward networks written out from the papers' pictures of them, on tensors in the official files' names.

Nothing of transformers or of our converters is used: what these functions give is what the rewards must give.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of [B, N, D] to [B, M, D]; `mask` is added to the logits."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    logits = logits if mask is None else logits + mask
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def patches(pixels: Tensor, kernel: Tensor, bias: Tensor | None, first: Tensor, positions: Tensor) -> Tensor:
    """An image's patches [B, 1 + N, D] behind a first token."""
    x = F.conv2d(pixels, kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
    return torch.cat([first.reshape(1, 1, -1).expand(len(x), 1, -1), x], dim=1) + positions


def open_clip_block(x: Tensor, w: Weights, name: str, heads: int, mask: Tensor | None = None) -> Tensor:
    y = norm(x, w, f"{name}.ln_1", 1e-5)
    y = F.linear(y, w[f"{name}.attn.in_proj_weight"], w[f"{name}.attn.in_proj_bias"])
    x = x + linear(attend(*y.chunk(3, dim=-1), heads, mask), w, f"{name}.attn.out_proj")
    y = F.gelu(linear(norm(x, w, f"{name}.ln_2", 1e-5), w, f"{name}.mlp.c_fc"))
    return x + linear(y, w, f"{name}.mlp.c_proj")


def layers(w: Weights, start: str) -> range:
    return range(1 + max(int(name.removeprefix(start).split(".")[0]) for name in w if name.startswith(start)))


def hpsv2(w: Weights, pixels: Tensor, ids: Tensor, *, heads: int) -> Tensor:
    """HPSv2's scores [B]: OpenCLIP's cosine."""
    x = patches(pixels, w["visual.conv1.weight"], None, w["visual.class_embedding"], w["visual.positional_embedding"])
    x = norm(x, w, "visual.ln_pre", 1e-5)
    for layer in layers(w, "visual.transformer.resblocks."):
        x = open_clip_block(x, w, f"visual.transformer.resblocks.{layer}", heads)
    image = norm(x[:, 0], w, "visual.ln_post", 1e-5) @ w["visual.proj"]

    length = ids.shape[1]
    x = w["token_embedding.weight"][ids] + w["positional_embedding"][:length]
    causal = torch.full((length, length), -torch.inf).triu(1)
    for layer in layers(w, "transformer.resblocks."):
        x = open_clip_block(x, w, f"transformer.resblocks.{layer}", heads, causal)
    x = norm(x, w, "ln_final", 1e-5)
    text = x[range(len(x)), ids.argmax(dim=-1)] @ w["text_projection"]
    return F.cosine_similarity(image, text)


def image_reward(w: Weights, pixels: Tensor, ids: Tensor, mask: Tensor, *, heads: int, text_heads: int) -> Tensor:
    """ImageReward's scores [B]: a BERT that also attends to a ViT's patches, and a linear head on its first token."""
    v = {name.removeprefix("blip.visual_encoder."): tensor for name, tensor in w.items()}
    kernel, bias = v["patch_embed.proj.weight"], v["patch_embed.proj.bias"]
    image = patches(pixels, kernel, bias, v["cls_token"], v["pos_embed"])
    for layer in layers(v, "blocks."):
        name = f"blocks.{layer}"
        qkv = linear(norm(image, v, f"{name}.norm1", 1e-6), v, f"{name}.attn.qkv").chunk(3, dim=-1)
        image = image + linear(attend(*qkv, heads), v, f"{name}.attn.proj")
        inner = F.gelu(linear(norm(image, v, f"{name}.norm2", 1e-6), v, f"{name}.mlp.fc1"))
        image = image + linear(inner, v, f"{name}.mlp.fc2")
    image = norm(image, v, "norm", 1e-6)

    t = {name.removeprefix("blip.text_encoder."): tensor for name, tensor in w.items()}
    x = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, t, "embeddings.LayerNorm", 1e-12)
    hidden = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]
    for layer in layers(t, "encoder.layer."):
        for part, seen, unseen in (("attention", None, hidden), ("crossattention", image, None)):
            name = f"encoder.layer.{layer}.{part}"
            seen = x if seen is None else seen
            q, k, v_ = (
                linear(y, t, f"{name}.self.{kind}") for y, kind in ((x, "query"), (seen, "key"), (seen, "value"))
            )
            out = linear(attend(q, k, v_, text_heads, unseen), t, f"{name}.output.dense")
            x = norm(out + x, t, f"{name}.output.LayerNorm", 1e-12)
        name = f"encoder.layer.{layer}"
        inner = F.gelu(linear(x, t, f"{name}.intermediate.dense"))
        x = norm(linear(inner, t, f"{name}.output.dense") + x, t, f"{name}.output.LayerNorm", 1e-12)
    return (head(w, x[:, 0], "mlp.layers.") - 0.16717362830052426) / 1.0333394966054072


def head(w: Weights, x: Tensor, start: str) -> Tensor:
    """The linear layers 0, 2, 4, 6, 7 with nothing between them, [B]."""
    for layer in (0, 2, 4, 6, 7):
        x = linear(x, w, f"{start}{layer}")
    return x[:, 0]


def step_aware_features(w: Weights, pixels: Tensor, timesteps: Tensor, *, heads: int) -> Tensor:
    """The image features [B, D] of SPO's preference model: a CLIP whose blocks a timestep shifts, scales and gates."""
    w = {name.removeprefix("model."): tensor for name, tensor in w.items()}
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128.0) / 128)
    angles = timesteps[:, None].float() * frequencies
    time = linear(torch.cat([angles.cos(), angles.sin()], dim=1), w, "t_embedder.mlp.0")
    time = F.silu(linear(F.silu(time), w, "t_embedder.mlp.2"))[:, None]

    start = "vision_model"
    table = (f"{start}.embeddings.{name}" for name in ("class_embedding", "position_embedding.weight"))
    x = patches(pixels, w[f"{start}.embeddings.patch_embedding.weight"], None, *(w[name] for name in table))
    x = norm(x, w, f"{start}.pre_layrnorm", 1e-5)
    for layer in layers(w, f"{start}.encoder.layers."):
        name = f"{start}.encoder.layers.{layer}"
        shift, scale, gate, shift2, scale2, gate2 = linear(time, w, f"{name}.adaLN_modulation.1").chunk(6, dim=-1)
        y = norm(x, w, f"{name}.layer_norm1", 1e-5) * (1 + scale) + shift
        q, k, v = (linear(y, w, f"{name}.self_attn.{part}_proj") for part in "qkv")
        x = x + gate * linear(attend(q, k, v, heads), w, f"{name}.self_attn.out_proj")
        y = linear(norm(x, w, f"{name}.layer_norm2", 1e-5) * (1 + scale2) + shift2, w, f"{name}.mlp.fc1")
        x = x + gate2 * linear(y * torch.sigmoid(1.702 * y), w, f"{name}.mlp.fc2")
    shift, scale = linear(time[:, 0], w, f"{start}.adaLN_modulation.1").chunk(2, dim=-1)
    pooled = norm(x[:, 0], w, f"{start}.post_layernorm", 1e-5) * (1 + scale) + shift
    return F.linear(pooled, w["visual_projection.weight"])

"""Where soft tokens go in a denoiser (AGSM, arXiv 2605.30038; SoftREPA): hooks around blocks, never a copied forward.

Some of a U-Net's blocks see [BOS, soft × n, rest of the prompt], the others the plain prompt: AGSM's tokens go to the
down and mid blocks, SoftREPA's for SD1.5 to the down blocks alone. SD3's first L joint blocks see the text stream
followed by their own layer's n tokens, which are removed after each block.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from agsm_rl.errors import UserError, unknown_name

PUBLISHED_LAYERS = 5
Place = Literal["down", "mid", "up"]
PUBLISHED_PLACES: tuple[Place, ...] = ("down", "mid")


class Tokens(Protocol):
    """What the hooks need: the tokens of a layer for the rows of `text` [B, S, D]; None while switched off."""

    num_tokens: int

    def rows_for(self, text: Tensor, layer: int) -> Tensor | None:
        """[B, n, D] in the dtype and on the device of `text`."""
        ...

    def is_on(self) -> bool:
        """Whether tokens are inserted."""
        ...


class CrossAttentionPlaces:
    """The blocks of a U-Net at some places, `down`, `mid` and `up`, that have cross-attention."""

    layers: int | None = None

    def __init__(self, denoiser: Any, places: Sequence[Place] = PUBLISHED_PLACES) -> None:
        self.denoiser: nn.Module = denoiser
        there = {"down": denoiser.down_blocks, "mid": [denoiser.mid_block], "up": denoiser.up_blocks}
        blocks = [block for place in get_args(Place) if place in places for block in there[place]]
        self.blocks = [block for block in blocks if getattr(block, "has_cross_attention", False)]
        self.width: int = denoiser.config.cross_attention_dim
        if not self.blocks:
            raise UserError(
                f"soft_tokens.places: no {' or '.join(places)} block of this {type(denoiser).__name__} has "
                "cross-attention."
            )

    def hook(self, tokens: Tokens) -> list[Any]:
        """Start inserting; returns the hooks, each with a `remove()`."""
        longer = LongerText(tokens)
        return [
            # Bank, timestep and parameters may change between calls of the denoiser: nothing is cached longer.
            self.denoiser.register_forward_pre_hook(longer.begin),
            self.denoiser.register_forward_hook(longer.end, always_call=True),
            *(
                block.register_forward_pre_hook(
                    partial(_insert, longer=longer, positions=argument_positions(block)), with_kwargs=True
                )
                for block in self.blocks
            ),
        ]


class JointPlaces:
    """The first `layers` joint blocks of SD3's transformer (published: 5)."""

    def __init__(self, denoiser: Any, layers: int | None) -> None:
        blocks = list(denoiser.transformer_blocks)
        if layers is not None and not 1 <= layers <= len(blocks):
            raise UserError(f"soft_tokens.layers: {layers}; this transformer has {len(blocks)} joint blocks.")
        self.layers: int = min(PUBLISHED_LAYERS, len(blocks)) if layers is None else layers
        self.blocks = blocks[: self.layers]
        self.width: int = denoiser.config.caption_projection_dim

    def hook(self, tokens: Tokens) -> list[Any]:
        """Start appending; returns the hooks, each with a `remove()`."""
        handles: list[Any] = []
        for layer, block in enumerate(self.blocks):
            append = partial(_append, tokens=tokens, layer=layer, positions=argument_positions(block))
            handles.append(block.register_forward_pre_hook(append, with_kwargs=True))
            handles.append(block.register_forward_hook(partial(_strip, tokens=tokens)))
        return handles


def check_places(places: Sequence[str]) -> tuple[Place, ...]:
    """The places, in a U-Net's order; UserError for one that does not exist, and for none."""
    for place in places:
        if place not in get_args(Place):
            raise unknown_name("soft_tokens.places", str(place), "a place in a U-Net", get_args(Place))
    if not places:
        raise UserError("soft_tokens.places: is empty; list some of down, mid, up, or leave it out (down, mid).")
    return tuple(place for place in get_args(Place) if place in places)


def places_in(
    denoiser: Any, layers: int | None, places: Sequence[Place] | None = None
) -> CrossAttentionPlaces | JointPlaces:
    """The places in a denoiser, by its structure; UserError if it has none, or `layers` or `places` do not fit."""
    if hasattr(denoiser, "transformer_blocks") and hasattr(denoiser, "context_embedder"):
        if places is not None:
            raise UserError(
                "soft_tokens.places: only a U-Net has down, mid and up blocks; leave it out here (SD3 has `layers`)."
            )
        return JointPlaces(denoiser, layers)
    if not hasattr(denoiser, "down_blocks"):
        raise UserError(
            f"soft_tokens: {type(denoiser).__name__} has no down blocks and no joint blocks; supported: U-Nets (SD1.5, "
            "SDXL) and SD3's transformer."
        )
    if layers is not None:
        raise UserError(
            "soft_tokens.layers: only SD3's joint blocks have a number of layers; leave it out here. Exported tokens "
            "that have layers were trained on SD3 and work only there."
        )
    return CrossAttentionPlaces(denoiser, PUBLISHED_PLACES if places is None else places)


def argument_positions(module: nn.Module) -> dict[str, int]:
    """The positions of the arguments of a module's forward."""
    return {name: number for number, name in enumerate(inspect.signature(module.forward).parameters)}


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LongerText:
    """The text [B, S, D] with soft tokens after BOS; the same for all blocks of a U-Net, so computed once per call."""

    def __init__(self, tokens: Tokens) -> None:
        self.num_tokens, self._tokens = tokens.num_tokens, tokens
        self._in_call = False
        self._cached: tuple[Tensor, Tensor] | None = None

    def __call__(self, text: Tensor) -> Tensor | None:
        """[B, S + n, D]; None while the tokens are switched off."""
        if self._cached is not None and self._cached[0] is text:
            return self._cached[1]
        rows = self._tokens.rows_for(text, 0)
        if rows is None:
            return None
        longer = torch.cat([text[:, :1], rows, text[:, 1:]], dim=1)
        # With gradients each block makes its own: gradient checkpointing runs single blocks again.
        if self._in_call and not torch.is_grad_enabled():
            self._cached = text, longer
        return longer

    def begin(self, *_: Any) -> None:
        """A call of the denoiser begins. A block that runs outside a call makes its own text."""
        if not torch.compiler.is_compiling():
            self._in_call, self._cached = True, None

    def end(self, *_: Any) -> None:
        """The call has ended."""
        if not torch.compiler.is_compiling():
            self._in_call, self._cached = False, None


def _insert(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, longer: LongerText, positions: dict[str, int]
) -> Arguments | None:
    """A U-Net block's arguments with soft tokens after BOS; unchanged arguments (None) when switched off."""
    call = _Call(list(args), dict(kwargs), positions)
    text = call.get("encoder_hidden_states")
    text = longer(text)
    if text is None:
        return None
    call.set("encoder_hidden_states", text)
    mask = call.get("encoder_attention_mask")
    if mask is not None:
        # Here the mask is a bias [B, 1, S] added to the attention scores: 0 means "seen".
        seen = mask.new_zeros(*mask.shape[:-1], longer.num_tokens)
        call.set("encoder_attention_mask", torch.cat([mask[..., :1], seen, mask[..., 1:]], dim=-1))
    return tuple(call.args), call.kwargs


def _append(
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    tokens: Tokens,
    layer: int,
    positions: dict[str, int],
) -> Arguments | None:
    """A joint block's arguments with its layer's tokens after the text."""
    call = _Call(list(args), dict(kwargs), positions)
    text = call.get("encoder_hidden_states")
    rows = tokens.rows_for(text, layer)
    if rows is None:
        return None
    call.set("encoder_hidden_states", torch.cat([text, rows], dim=1))
    return tuple(call.args), call.kwargs


def _strip(_: nn.Module, args: tuple[Any, ...], result: tuple[Any, Any], *, tokens: Tokens) -> tuple[Any, Any] | None:
    """A joint block's result (text, image) without the tokens; the last block returns no text."""
    text, image = result
    if text is None or not tokens.is_on():
        return None
    return text[:, : -tokens.num_tokens], image


class _Call:
    """A call's arguments by name, whether passed by position or by keyword."""

    def __init__(self, args: list[Any], kwargs: dict[str, Any], positions: dict[str, int]) -> None:
        self.args, self.kwargs, self.positions = args, kwargs, positions

    def get(self, name: str) -> Any:
        position = self.positions[name]
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def set(self, name: str, value: Any) -> None:
        position = self.positions[name]
        if position < len(self.args):
            self.args[position] = value
        else:
            self.kwargs[name] = value

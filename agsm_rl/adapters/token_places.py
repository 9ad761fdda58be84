"""Where soft tokens go in a denoiser (AGSM, arXiv 2605.30038; SoftREPA): hooks around blocks, never a copied forward.

A backbone says where they enter its denoiser: `Backbone.token_places` returns one of the two forms here, or its own.

`CrossAttentionPlaces`, U-Nets: some blocks see [BOS, soft × n, rest of the prompt], the others the plain prompt. AGSM's
tokens go to the down and mid blocks, SoftREPA's for SD1.5 to the down blocks alone.
`StreamPlaces`, transformers: the first L blocks see the text stream and their own layer's n tokens, which are removed
after each block. What else has a row per token (a mask, rotary positions) is lengthened with it, by functions that the
backbone gives.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from agsm_rl.errors import UserError, unknown_name

PUBLISHED_LAYERS = 5
UNetPlace = Literal["down", "mid", "up"]
PUBLISHED_PLACES: tuple[UNetPlace, ...] = ("down", "mid")


class Tokens(Protocol):
    """What the hooks need: the tokens of a layer for the rows of `text` [B, S, D]; None while switched off."""

    num_tokens: int

    def rows_for(self, text: Tensor, layer: int) -> Tensor | None:
        """[B, n, D] in the dtype and on the device of `text`."""
        ...

    def is_on(self) -> bool:
        """Whether tokens are inserted."""
        ...


class TokenPlaces(Protocol):
    """Where the tokens of one denoiser go."""

    width: int
    """D of a token."""

    @property
    def layers(self) -> int | None:
        """The number of layers that have tokens of their own.

        None: all blocks see the same, which are in the space of `Cond.embeds` and may begin as the encoder's BOS.
        """
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules that see them."""
        ...

    def hook(self, tokens: Tokens) -> list[Any]:
        """Start inserting; returns the hooks, each with a `remove()`.

        The hooks ask `tokens.rows_for(text, layer)` at each call and do nothing while it is None: switched off, the
        denoiser computes what it computes without hooks, bit for bit.
        """
        ...


class CrossAttentionPlaces:
    """The blocks of a U-Net at some places, `down`, `mid` and `up`, that have cross-attention."""

    layers: int | None = None

    def __init__(self, denoiser: Any, places: Sequence[UNetPlace] = PUBLISHED_PLACES) -> None:
        self.denoiser: nn.Module = denoiser
        there = {"down": denoiser.down_blocks, "mid": [denoiser.mid_block], "up": denoiser.up_blocks}
        blocks = [block for place in get_args(UNetPlace) if place in places for block in there[place]]
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


Lengthen = Callable[["BlockCall", Tensor], None]
"""Puts rows [B, n, D] into a block's arguments: the text, and what else has a row per token of it."""
Shorten = Callable[[Any, int], Any]
"""Takes n rows out of a block's result again."""


def append_to_text(call: "BlockCall", rows: Tensor) -> None:
    """The rows after the text; nothing else knows how long it is."""
    call.set("encoder_hidden_states", torch.cat([call.get("encoder_hidden_states"), rows], dim=1))


def drop_from_text(result: tuple[Any, Any], count: int) -> tuple[Any, Any]:
    """A joint block's result (text, image) without the last rows of the text; the last block returns no text."""
    text, image = result
    return (text if text is None else text[:, :-count]), image


class StreamPlaces:
    """The first `layers` of a transformer's blocks (published: 5), each with its own tokens beside the text.

    Args:
        blocks: The transformer's blocks, in order.
        layers: The adapter's option; None is 5, or as many as there are.
        width: D of the stream that the tokens join, inside the blocks.
        stream: The argument of a block's forward that is this stream, [B, S, D].
        lengthen: Puts the rows into a call's arguments. Rows must be seen by all rows that see the text: extend masks
            with "seen", and rotary positions as the model would number them.
        shorten: Takes them out of a block's result; None where a block does not return the text (cross-attention).
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        layers: int | None,
        *,
        width: int,
        stream: str = "encoder_hidden_states",
        lengthen: Lengthen = append_to_text,
        shorten: Shorten | None = drop_from_text,
    ) -> None:
        blocks = list(blocks)
        if layers is not None and not 1 <= layers <= len(blocks):
            raise UserError(f"soft_tokens.layers: {layers}; this transformer has {len(blocks)} blocks that take them.")
        self.layers: int = min(PUBLISHED_LAYERS, len(blocks)) if layers is None else layers
        self.blocks = blocks[: self.layers]
        self.width, self._stream, self._lengthen, self._shorten = width, stream, lengthen, shorten

    def hook(self, tokens: Tokens) -> list[Any]:
        """Start inserting; returns the hooks, each with a `remove()`."""
        handles: list[Any] = []
        for layer, block in enumerate(self.blocks):
            before = partial(self._before, tokens=tokens, layer=layer, positions=argument_positions(block))
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            if self._shorten is not None:
                handles.append(block.register_forward_hook(partial(self._after, tokens=tokens)))
        return handles

    def _before(
        self,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        tokens: Tokens,
        layer: int,
        positions: dict[str, int],
    ) -> "Arguments | None":
        call = BlockCall(list(args), dict(kwargs), positions)
        rows = tokens.rows_for(call.get(self._stream), layer)
        if rows is None:
            return None
        self._lengthen(call, rows)
        return tuple(call.args), call.kwargs

    def _after(self, _: nn.Module, args: tuple[Any, ...], result: Any, *, tokens: Tokens) -> Any:
        assert self._shorten is not None
        return self._shorten(result, tokens.num_tokens) if tokens.is_on() else None


def check_places(places: Sequence[str]) -> tuple[UNetPlace, ...]:
    """The places, in a U-Net's order; UserError for one that does not exist, and for none."""
    for place in places:
        if place not in get_args(UNetPlace):
            raise unknown_name("soft_tokens.places", str(place), "a place in a U-Net", get_args(UNetPlace))
    if not places:
        raise UserError("soft_tokens.places: is empty; list some of down, mid, up, or leave it out (down, mid).")
    return tuple(place for place in get_args(UNetPlace) if place in places)


def no_unet(places: Sequence[UNetPlace] | None) -> None:
    """UserError for `places` on a transformer."""
    if places is not None:
        raise UserError(
            "soft_tokens.places: only a U-Net has down, mid and up blocks; leave it out here (transformers have "
            "`layers`)."
        )


def uncompiled(denoiser: Any) -> Any:
    """The module that `torch.compile` was given; hooks belong on it."""
    return getattr(denoiser, "_orig_mod", denoiser)


def argument_positions(module: nn.Module) -> dict[str, int]:
    """The positions of the arguments of a module's forward; of the module itself where torch.compile has wrapped it."""
    forward = getattr(module, "_orig_mod", module).forward
    return {name: number for number, name in enumerate(inspect.signature(forward).parameters)}


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
    call = BlockCall(list(args), dict(kwargs), positions)
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


class BlockCall:
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

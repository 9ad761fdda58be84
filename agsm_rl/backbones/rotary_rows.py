"""Soft tokens beside a text whose blocks have rotary positions: FLUX.1's and FLUX.2's.

A block gets its tokens in front of the text, and their positions in front of its rotary tables. Attention knows the
order of rows by these alone, so the tokens stand where their positions say. They are put in front because a
single-stream block sees text and image as one stream, and does not know how long the text is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agsm_rl.adapters.token_places import BlockCall, Lengthen


def put_in_front(
    pos_embed: Callable[[Tensor], tuple[Tensor, Tensor]], positions: Callable[[int, torch.device], Tensor]
) -> Lengthen:
    """Lengthens a block's text, or its joint stream that begins with the text, by rows in front.

    pos_embed: The transformer's; gives the cosines and sines [n, D] of positions [n, axes].
    positions: Those of so many rows, on a device.
    """

    def lengthen(call: BlockCall, rows: Tensor) -> None:
        stream = "hidden_states" if call.get("encoder_hidden_states") is None else "encoder_hidden_states"
        call.set(stream, torch.cat([rows, call.get(stream)], dim=1))
        tables = call.get("image_rotary_emb")
        added = pos_embed(positions(rows.shape[1], tables[0].device))
        call.set("image_rotary_emb", tuple(torch.cat(pair) for pair in zip(added, tables, strict=True)))

    return lengthen


def drop_from_front(result: Any, count: int) -> Any:
    """A block's result, (text, image) or their joint stream, without the first rows."""
    if isinstance(result, Tensor):
        return result[:, count:]
    text, image = result
    return text[:, count:], image

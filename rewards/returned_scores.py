"""What a reward function of the user's may return, as scores [B]: a tensor, an array or a list of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agsm_rl.errors import UserError

WANTED = "a reward returns one score per image: a tensor, an array or a list of {count} numbers"


def one_score_per_image(returned: Any, prompts: list[str], *, reward: str, device: torch.device) -> Tensor:
    """`returned` as scores [B] on `device`; a tensor keeps its graph.

    (scores, info), as in ddpo-pytorch and TRL's DDPOTrainer, and {"avg": scores}, as in flow_grpo, are taken too.
    Raises UserError for any other shape, and for None among the scores.
    """
    scores = _without_info(returned)
    if not isinstance(scores, Tensor):
        scores = _tensor(scores, prompts, reward)
    rehearsed = device.type == "meta"  # a prediction of memory: the images are on meta too
    if (
        scores is None
        or not (rehearsed or is_plain(scores))
        or scores.shape not in ((len(prompts),), (len(prompts), 1))
    ):
        got = type(returned).__name__ if scores is None else kind_of(scores)
        raise UserError(
            f"reward '{reward}': {WANTED.format(count=len(prompts))}; it returned {got}: {_short(returned)}"
        )
    return scores.reshape(len(prompts)).float().to(device)


def is_plain(scores: Tensor) -> bool:
    """Whether these are real numbers in memory, as a score is; not complex, sparse, nested, quantised or on meta."""
    odd = scores.is_complex() or scores.is_quantized or scores.is_nested or scores.is_meta
    return not odd and scores.layout == torch.strided


def kind_of(scores: Tensor) -> str:
    """For messages: a tensor's shape, and what else is odd about it."""
    if scores.is_nested:
        return "a nested tensor"
    odd = "" if is_plain(scores) else f" ({scores.dtype}, {scores.layout}, on {scores.device.type})"
    return f"shape {tuple(scores.shape)}{odd}"


def _without_info(returned: Any) -> Any:
    """The scores alone, where something is returned beside them."""
    if isinstance(returned, tuple) and len(returned) == 2 and not np.isscalar(returned[0]) and _is_long(returned[0]):
        returned = returned[0]
    return returned.get("avg") if isinstance(returned, Mapping) else returned


def _is_long(value: Any) -> bool:
    """Whether this holds scores, and is not a score."""
    return isinstance(value, list | tuple | Mapping) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 0)


def _tensor(scores: Any, prompts: list[str], reward: str) -> Tensor | None:
    """An array or a sequence of numbers or 0-d tensors as a tensor; None if it is none."""
    if isinstance(scores, str | bytes | bytearray | memoryview | set | frozenset):
        return None  # they have a length and no scores, or scores without an order
    if isinstance(scores, np.ndarray) and (scores.dtype.kind not in "biufO" or isinstance(scores, np.ma.MaskedArray)):
        return None
    try:
        if not isinstance(scores, np.ndarray) or scores.dtype.kind == "O":
            scores = list(islice(iter(scores), len(prompts) + 1))  # it may have no end
        if isinstance(scores, list) and None in [None if score is None else 0 for score in scores]:
            prompt = prompts[[score is None for score in scores].index(True)] if len(scores) == len(prompts) else ""
            raise UserError(f"reward '{reward}': it returned None, and no score, for the prompt '{prompt}'")
        if isinstance(scores, list) and scores and all(isinstance(score, Tensor) for score in scores):
            return torch.stack(scores)
        return torch.from_numpy(np.asarray(scores, dtype=np.float32))
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - whatever a user's object makes of being read
        return None


def _short(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # noqa: BLE001 - a user's object
        return f"its repr fails with {type(error).__name__}"
    return text if len(text) <= 200 else text[:199] + "…"

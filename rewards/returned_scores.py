"""What a reward function of the user's may return, as scores [B]: a tensor, an array or a list of numbers."""

from __future__ import annotations

from collections.abc import Mapping
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
    if scores is None or scores.shape not in ((len(prompts),), (len(prompts), 1)) or scores.is_complex():
        got = type(returned).__name__ if scores is None else f"shape {tuple(scores.shape)}"
        raise UserError(
            f"reward '{reward}': {WANTED.format(count=len(prompts))}; it returned {got}: {_short(returned)}"
        )
    return scores.reshape(len(prompts)).float().to(device)


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
    try:
        scores = scores if isinstance(scores, np.ndarray) else list(scores)
        if isinstance(scores, list) and None in [None if score is None else 0 for score in scores]:
            prompt = prompts[[score is None for score in scores].index(True)] if len(scores) == len(prompts) else ""
            raise UserError(f"reward '{reward}': it returned None, and no score, for the prompt '{prompt}'")
        if isinstance(scores, list) and scores and all(isinstance(score, Tensor) for score in scores):
            return torch.stack(scores)
        return torch.from_numpy(np.asarray(scores, dtype=np.float32))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else text[:199] + "…"

"""What rewards with a network share: late loading, a network in memory once, and the choice of preprocessing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakValueDictionary

import torch
from agsm_rl_rewards.preprocessing import Preprocessing, pictures
from torch import Tensor, nn

from agsm_rl.errors import UserError, unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

Way = Literal["auto", "exact", "tensor"]
IMAGES_AT_ONCE = 32
"""Enough to keep a GPU busy; with gradients, all images are held in memory anyway."""

_networks: WeakValueDictionary[Hashable, nn.Module] = WeakValueDictionary()
"""The networks in use, so that a reward used for training and for evaluation is in memory once."""


class NativeReward:
    """A reward whose network is loaded on first use, in float32, and follows the images' device.

    A subclass defines `identity` (what its network depends on), `load`, `pixels` and `score`; `aesthetic.py` is a
    short example.

    Args:
        preprocessing: `exact` scores 8-bit pictures as the official package does; `tensor` lets gradients reach the
            pixels; `auto` is `tensor` where a gradient is needed and `exact` everywhere else.
    """

    name: str
    range: tuple[float, float]
    licence: str
    differentiable = True

    def __init__(self, preprocessing: Way) -> None:
        if preprocessing not in get_args(Way):
            raise unknown_name("preprocessing", preprocessing, "a kind of preprocessing", get_args(Way))
        self.preprocessing = preprocessing
        self.differentiable = preprocessing != "exact"
        self._network: Any = None

    def identity(self) -> Hashable:
        """What the network depends on: rewards of one class with equal identities share it."""
        raise NotImplementedError

    def load(self) -> nn.Module:
        """The network with its weights; it may hold a tokenizer as well."""
        raise NotImplementedError

    def pixels(self) -> Preprocessing:
        """How images become the network's input; called once the network is loaded."""
        raise NotImplementedError

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of normalised pixels [B, 3, size, size]."""
        raise NotImplementedError

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        if len(images) != len(prompts):
            raise ValueError(f"reward '{self.name}': {len(images)} images, but {len(prompts)} prompts")
        needs_gradient = torch.is_grad_enabled() and images.requires_grad
        if needs_gradient and self.preprocessing == "exact":
            raise UserError(
                f"reward '{self.name}': `preprocessing: exact` goes through 8-bit pictures and has no gradient; "
                "leave it out, or set it to `tensor`"
            )
        if self.preprocessing == "tensor" or needs_gradient:
            self.prepare(images.device)
            preprocess = self.pixels().tensor
            parts = [preprocess(part.float()) for part in images.split(IMAGES_AT_ONCE)]
            return self._scores(parts, prompts, images.device)
        return self.score_pictures(pictures(images), prompts, device=images.device)

    def score_pictures(
        self, pictures: Sequence[Image], prompts: list[str], *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Scores [B] of PIL pictures of any size, exactly as the official package scores files; without gradients."""
        device = torch.device(device)
        self.prepare(device)
        preprocess = self.pixels().exact
        starts = range(0, len(pictures), IMAGES_AT_ONCE)
        with torch.no_grad():
            parts = [preprocess(pictures[start : start + IMAGES_AT_ONCE]) for start in starts]
            return self._scores(parts, prompts, device)

    def _scores(self, parts: Sequence[Tensor], prompts: list[str], device: torch.device) -> Tensor:
        scores, start = [], 0
        for part in parts:
            scores.append(self.score(part.to(device), prompts[start : start + len(part)]).float())
            start += len(part)
        return torch.cat(scores)

    def prepare(self, device: torch.device | str) -> None:
        """Load the weights unless they are loaded, and move the network to `device`; UserError if they cannot be."""
        if self._network is None:
            key = (type(self), self.identity())
            network = _networks.get(key)
            if network is None:
                network = self.load().eval().requires_grad_(False)
                _networks[key] = network
            self._network = network
        self._network.to(device)

    @property
    def network(self) -> Any:
        """The network, once `prepare` has been called."""
        return self._network

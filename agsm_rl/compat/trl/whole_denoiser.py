"""All of a denoiser's weights as an adapter, which is what TRL trains without LoRA."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Bank, Banks


class WholeDenoiser:
    """The denoiser's weights, trained in place. A copy of the base's weights in CPU memory allows switching it off."""

    kind: ClassVar[str] = "whole_denoiser"
    mixes_banks: ClassVar[bool] = False
    banks = 1
    changes_text = False

    def __init__(self) -> None:
        self.bank: Bank | Banks | None = None
        self._backbone: Backbone | None = None
        self._base: dict[str, Tensor] = {}

    @classmethod
    def from_export(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """A new adapter; attach it, then call `load_export`."""
        return cls()

    def attach(self, backbone: Backbone) -> None:
        """Keep the base's weights and make the denoiser's trainable."""
        if self._backbone is not None:
            raise RuntimeError("this adapter is already attached; detach it first")
        self._backbone = backbone
        self._base = {name: value.detach().cpu().clone() for name, value in self.named_parameters()}
        backbone.denoiser.requires_grad_(True)
        self.bank = "positive"
        backbone.adapters.append(self)

    def detach(self) -> None:
        """Put the base's weights back and freeze them."""
        if self._backbone is None:
            return
        self.load_export(self._base, {})
        self._backbone.denoiser.requires_grad_(False)
        self._backbone.adapters.remove(self)
        self._backbone, self._base, self.bank = None, {}, None

    def places(self, backbone: Backbone) -> list[str]:
        """The denoiser itself."""
        return [""]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The denoiser's parameters under their own names."""
        assert self._backbone is not None
        yield from self._backbone.denoiser.named_parameters()

    @contextmanager
    def using(self, bank: Bank | Banks | None) -> Iterator[None]:
        """Within the block, use the trained weights (for either bank), or the base's weights for None."""
        previous = self.bank
        self._switch(bank)
        try:
            yield
        finally:
            self._switch(previous)

    def recall(self) -> AbstractContextManager[None]:
        """A context that restores the current choice of weights when it is entered."""
        return self.using(self.bank)

    def _switch(self, bank: Bank | Banks | None) -> None:
        if (bank is None) != (self.bank is None):
            torch.clear_autocast_cache()
            for name, parameter in self.named_parameters():
                other = self._base[name].to(parameter)
                self._base[name], parameter.data = parameter.data.cpu(), other
        self.bank = bank

    def export(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All weights, under their own names."""
        assert self._backbone is not None
        tensors = {name: value.detach().cpu().clone() for name, value in self.named_parameters()}
        return tensors, {"kind": self.kind, "base": self._backbone.name}

    def load_export(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Fill the weights; UserError if they belong to a different network."""
        places = dict(self.named_parameters())
        if {name: value.shape for name, value in places.items()} != {
            key: value.shape for key, value in tensors.items()
        }:
            raise UserError("the weights do not fit this denoiser: their names or shapes differ")
        for name, parameter in places.items():
            parameter.data.copy_(tensors[name])

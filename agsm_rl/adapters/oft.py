"""OFT (arXiv 2306.07280, 2506.19847) through PEFT: each layer's inputs are rotated in blocks, which keeps its norms."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from agsm_rl.adapters.lora_export import common_option
from agsm_rl.adapters.peft_adapter import PeftAdapter
from agsm_rl.errors import UserError
from agsm_rl.source_code import takes

OPTIONS = ("oft_block_size", "block_share", "use_cayley_neumann")
MAX_BLOCK = 4096
"""Wider than the layers themselves."""


class OFT(PeftAdapter):
    """Rotations of linear layers' inputs, block by block; they start as the identity, so training starts at the base.

    Angles between a layer's neurons stay as they were, so the base's knowledge drifts less than under additions. No
    other tool reads its files: LyCORIS' OFT rotates outputs. `attach` and PEFT do (`agsm-rl convert --to peft`).

    Args:
        oft_block_size: Width of a block, from 2. In a layer whose width it does not divide, the nearest divisor.
        block_share: Give all blocks of a layer the same rotation: fewest parameters.
        use_cayley_neumann: Approximate each rotation by five terms of a series, as PEFT does by default; the exact
            one needs a matrix inverse for each prediction.
    """

    kind: ClassVar[str] = "oft"
    title: ClassVar[str] = "OFT"
    config_class: ClassVar[str] = "OFTConfig"
    only_adds = False

    @takes(PeftAdapter)
    def __init__(
        self,
        *,
        oft_block_size: int = 32,
        block_share: bool = False,
        use_cayley_neumann: bool = True,
        **common: Any,
    ) -> None:
        if not 2 <= oft_block_size <= MAX_BLOCK:
            raise UserError(f"oft.oft_block_size: {oft_block_size}; allowed: 2 to {MAX_BLOCK}.")
        self.oft_block_size, self.block_share = oft_block_size, block_share
        self.use_cayley_neumann = use_cayley_neumann
        super().__init__(**common)

    def _described(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> dict[str, Any]:
        return {"target_modules": list(targets), "r": 0} | {name: getattr(self, name) for name in OPTIONS}

    @classmethod
    def _options(cls, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, expected in zip(OPTIONS, (int, bool, bool), strict=True):
            options[name] = common_option(configs, name, expected, title=cls.title)
        return options

    def _check_export(self, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> None:
        for name, value in self._options(tensors, configs).items():
            if value != getattr(self, name):
                raise UserError(f"{self.title}: {name} is {value} in the file, {getattr(self, name)} here.")

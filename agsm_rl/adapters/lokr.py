"""LoKr (LyCORIS, arXiv 2309.14859) through PEFT: each weight gets a Kronecker product of two small matrices."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from agsm_rl.adapters.lora_export import common_option
from agsm_rl.adapters.low_rank import LowRank
from agsm_rl.errors import UserError
from agsm_rl.source_code import takes


class LoKr(LowRank):
    """Additions (alpha / rank)·w1 ⊗ w2, w2 of low rank if it is large; w1 starts at 0: training starts from the base.

    The Kronecker product reaches a high rank with far fewer parameters than LoRA. Files have LyCORIS' names.

    Args:
        rank: Rank of w2 (and of w1, with `decompose_both`); a factor that is not much wider stays a full matrix.
        decompose_both: Give w1 a low rank too.
        decompose_factor: Size of w1: the layer's widths are divided by the largest divisor up to this. -1 divides them
            as evenly as possible, which needs the fewest parameters.
    """

    kind: ClassVar[str] = "lokr"
    title: ClassVar[str] = "LoKr"
    config_class: ClassVar[str] = "LoKrConfig"
    peft_type: ClassVar[str] = "LOKR"
    needs_weights = True

    @takes(LowRank)
    def __init__(self, *, decompose_both: bool = False, decompose_factor: int = -1, **common: Any) -> None:
        if decompose_factor != -1 and decompose_factor < 1:
            raise UserError(f"lokr.decompose_factor: {decompose_factor}; allowed: -1, or 1 or more.")
        self.decompose_both, self.decompose_factor = decompose_both, decompose_factor
        super().__init__(**common)

    def _described(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> dict[str, Any]:
        own = {"decompose_both": self.decompose_both, "decompose_factor": self.decompose_factor}
        return super()._described(part, targets, layers) | own

    @classmethod
    def _options(cls, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        options = super()._options(tensors, configs)
        for name, expected in (("decompose_both", bool), ("decompose_factor", int)):
            options[name] = common_option(configs, name, expected, title=cls.title)
        return options

"""What LoRA, LoKr and LoHa share: additions of low rank, scaled by alpha / rank layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from agsm_rl.adapters.lora_ranks import (
    LoraScale,
    check_alphas,
    options_of_export,
    peft_scale,
    scale_of_options,
    scales_of_export,
)
from agsm_rl.adapters.peft_adapter import PeftAdapter
from agsm_rl.source_code import takes


class LowRank(PeftAdapter):
    """An adapter of PEFT's whose additions have a rank and a scale.

    Args:
        rank: Rank of the additions, 1 or more.
        alpha: Scale times rank. Null means the rank: a scale of 1, as in diffusers' own training scripts.
        rank_pattern: Ranks of the modules whose names end so, such as `{attn2.to_k: 32}`; by default all have `rank`.
        alpha_pattern: Likewise for alpha.
        seed: Seed of the initial values.
    """

    peft_type: ClassVar[str]
    """PEFT's name of the kind, in files' metadata."""
    peft_alpha: ClassVar[str] = "alpha"
    """PEFT's name of alpha."""
    scale: LoraScale
    use_rslora: bool = False

    @takes(PeftAdapter)
    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        seed: int = 0,
        **common: Any,
    ) -> None:
        self.scale = scale_of_options(self.kind, rank, alpha, rank_pattern, alpha_pattern, rslora=self.use_rslora)
        self.rank, self.alpha = self.scale.rank, self.scale.alpha
        super().__init__(**common)
        self.seed = seed

    def _described(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> dict[str, Any]:
        return peft_scale(self.scale, part, layers, alpha=self.peft_alpha) | {"target_modules": list(targets)}

    @classmethod
    def _options(cls, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return options_of_export(tensors, configs, title=cls.title, kind=cls.peft_type, alpha=cls.peft_alpha)

    @classmethod
    def _scales(cls, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, LoraScale]:
        """The scale of each part of a pipeline that an export's metadata describes."""
        return scales_of_export(configs, title=cls.title, kind=cls.peft_type, alpha=cls.peft_alpha)

    def _check_export(self, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> None:
        check_alphas(self.scale, tensors, self._scales(configs), self.title)

"""LoKr (LyCORIS, arXiv 2309.14859) through PEFT: each weight gets a Kronecker product of two small matrices."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from agsm_rl.adapters.lora_export import common_option
from agsm_rl.adapters.lora_ranks import (
    LoraScale,
    check_alphas,
    options_of_export,
    peft_scale,
    scale_of_options,
    scales_of_export,
)
from agsm_rl.adapters.peft_adapter import TARGETS, PeftAdapter
from agsm_rl.errors import UserError
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt


class LoKr(PeftAdapter):
    """Additions (alpha / rank)·w1 ⊗ w2, w2 of low rank if it is large; w1 starts at 0: training starts from the base.

    The Kronecker product reaches a high rank with far fewer parameters than LoRA. Files have LyCORIS' names.

    Args:
        rank: Rank of w2 (and of w1, with `decompose_both`); a factor that is not much wider stays a full matrix.
        alpha: Scale times rank. Null means the rank: a scale of 1.
        rank_pattern: Ranks of the modules whose names end so, such as `{attn2.to_k: 32}`; by default all have `rank`.
        alpha_pattern: Likewise for alpha.
        decompose_both: Give w1 a low rank too.
        decompose_factor: Size of w1: the layer's widths are divided by the largest divisor up to this. -1 divides them
            as evenly as possible, which needs the fewest parameters.
        banks: 1 uses the same bank for positive and negative prompts; 2 gives the negative prompts a separate bank.
        target_modules: Name suffixes of the denoiser's modules to change, as for `lora`.
        text_encoders: Also change the attention projections of the CLIPs, as for `lora`.
        seed: Seed of the initial values.
        guidance_bank: Bank of guidance's unconditional branch, as for `lora`.
        guidance_prompt: Prompt of that branch, as for `lora`.
    """

    kind: ClassVar[str] = "lokr"
    title: ClassVar[str] = "LoKr"
    scale: LoraScale
    needs_weights = True

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        decompose_both: bool = False,
        decompose_factor: int = -1,
        banks: int = 1,
        target_modules: tuple[str, ...] = TARGETS,
        text_encoders: bool = False,
        seed: int = 0,
        guidance_bank: GuidanceBank = "positive",
        guidance_prompt: GuidancePrompt = "empty",
    ) -> None:
        self.scale = scale_of_options(self.kind, rank, alpha, rank_pattern, alpha_pattern)
        self.rank, self.alpha = self.scale.rank, self.scale.alpha
        if decompose_factor != -1 and decompose_factor < 1:
            raise UserError(f"lokr.decompose_factor: {decompose_factor}; allowed: -1, or 1 or more.")
        self.decompose_both, self.decompose_factor = decompose_both, decompose_factor
        super().__init__(
            banks=banks,
            target_modules=target_modules,
            text_encoders=text_encoders,
            seed=seed,
            guidance_bank=guidance_bank,
            guidance_prompt=guidance_prompt,
        )

    def _config(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> Any:
        from peft import LoKrConfig

        return LoKrConfig(**self._described(part, targets, layers))

    def _described(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> dict[str, Any]:
        return peft_scale(self.scale, part, layers, alpha="alpha") | {
            "target_modules": list(targets),
            "decompose_both": self.decompose_both,
            "decompose_factor": self.decompose_factor,
        }

    @classmethod
    def _options(cls, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        options = options_of_export(tensors, configs, title=cls.title, kind="LOKR", alpha="alpha")
        for name, expected in (("decompose_both", bool), ("decompose_factor", int)):
            options[name] = common_option(configs, name, expected, title=cls.title)
        return options

    def _check_export(self, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> None:
        scales = scales_of_export(configs, title=self.title, kind="LOKR", alpha="alpha")
        check_alphas(self.scale, tensors, scales, self.title)

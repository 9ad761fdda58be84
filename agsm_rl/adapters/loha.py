"""LoHa (FedPara, arXiv 2108.06098) through PEFT: each weight gets the product, entry by entry, of two LoRAs."""

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
from agsm_rl.adapters.peft_adapter import TARGETS, PeftAdapter
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt


class LoHa(PeftAdapter):
    """Additions (alpha / rank)·(w1_a·w1_b) ∘ (w2_a·w2_b); w2_b starts at 0, so training starts from the base model.

    The product reaches rank² with the parameters of a LoRA of twice the rank. Files have LyCORIS' names (hada_w1_a, …).

    Args:
        rank: Rank of each of the two factors.
        alpha: Scale times rank. Null means the rank: a scale of 1.
        rank_pattern: Ranks of the modules whose names end so, such as `{attn2.to_k: 32}`; by default all have `rank`.
        alpha_pattern: Likewise for alpha.
        banks: 1 uses the same bank for positive and negative prompts; 2 gives the negative prompts a separate bank.
        target_modules: Name suffixes of the denoiser's modules to change, as for `lora`.
        text_encoders: Also change the attention projections of the CLIPs, as for `lora`.
        seed: Seed of the initial values.
        guidance_bank: Bank of guidance's unconditional branch, as for `lora`.
        guidance_prompt: Prompt of that branch, as for `lora`.
    """

    kind: ClassVar[str] = "loha"
    title: ClassVar[str] = "LoHa"
    scale: LoraScale
    needs_weights = True

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        banks: int = 1,
        target_modules: tuple[str, ...] = TARGETS,
        text_encoders: bool = False,
        seed: int = 0,
        guidance_bank: GuidanceBank = "positive",
        guidance_prompt: GuidancePrompt = "empty",
    ) -> None:
        self.scale = scale_of_options(self.kind, rank, alpha, rank_pattern, alpha_pattern)
        self.rank, self.alpha = self.scale.rank, self.scale.alpha
        super().__init__(
            banks=banks,
            target_modules=target_modules,
            text_encoders=text_encoders,
            seed=seed,
            guidance_bank=guidance_bank,
            guidance_prompt=guidance_prompt,
        )

    def _config(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> Any:
        from peft import LoHaConfig

        return LoHaConfig(**self._described(part, targets, layers))

    def _described(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> dict[str, Any]:
        return peft_scale(self.scale, part, layers, alpha="alpha") | {"target_modules": list(targets)}

    @classmethod
    def _options(cls, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return options_of_export(tensors, configs, title=cls.title, kind="LOHA", alpha="alpha")

    def _check_export(self, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> None:
        scales = scales_of_export(configs, title=self.title, kind="LOHA", alpha="alpha")
        check_alphas(self.scale, tensors, scales, self.title)

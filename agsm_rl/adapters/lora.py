"""LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353) through PEFT."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from agsm_rl.adapters.lora_export import layers_of
from agsm_rl.adapters.low_rank import LowRank
from agsm_rl.adapters.peft_layers import MAGNITUDE
from agsm_rl.errors import UserError
from agsm_rl.source_code import takes


class LoRA(LowRank):
    """Low-rank additions (alpha / rank)·B·A to linear layers; B starts at 0, so training starts from the base model.

    Args:
        use_rslora: Scale by alpha / √rank (rsLoRA), which keeps high ranks from learning too little. Needs `alpha`.
        use_dora: Also train the length of each row of the changed weight, m·(W + B·A) / |W + B·A| (DoRA). Slower, and
            needs memory for each changed weight; useful at low ranks.
        seed: Seed of the initial A, drawn from N(0, 1 / rank²).
    """

    kind: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    config_class: ClassVar[str] = "LoraConfig"
    peft_type: ClassVar[str] = "LORA"
    peft_alpha: ClassVar[str] = "lora_alpha"

    @takes(LowRank)
    def __init__(self, *, use_rslora: bool = False, use_dora: bool = False, **common: Any) -> None:
        self.use_rslora, self.use_dora = use_rslora, use_dora
        self.only_adds, self.needs_weights = not use_dora, use_dora
        super().__init__(**common)

    def _config(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> Any:
        import peft

        return peft.LoraConfig(**self._described(part, targets, layers), init_lora_weights="gaussian")

    def _described(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> dict[str, Any]:
        return super()._described(part, targets, layers) | ({"use_dora": True} if self.use_dora else {})

    def _prepared(self, layer: Any, bank: str) -> None:
        if self.use_dora:  # again in float32: from a bfloat16 base's lengths, training would not start at the base
            layer.lora_magnitude_vector[bank].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[bank].weight.detach(),
                lora_B=layer.lora_B[bank].weight.detach(),
                scaling=layer.scaling[bank],
            )

    @classmethod
    def _options(cls, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        options, scales = super()._options(tensors, configs), cls._scales(configs)
        magnitudes = set()
        for layer, roles in layers_of(tensors).items():
            magnitudes.add(MAGNITUDE in roles)
            part, _, module = layer.partition(".")
            rank = len(roles["lora_A"]) if "lora_A" in roles and roles["lora_A"].ndim else 0
            if part in scales and rank != scales[part].rank_of(module):
                raise UserError(
                    f"{cls.title}: the rank of the file's tensors is {rank}, of its metadata "
                    f"{[scales[part].rank_of(module)]} ('{layer}')."
                )
        stated = {scale.dora for scale in scales.values()}
        if len(stated | magnitudes) > 1:
            raise UserError(
                f"{cls.title}: use_dora is {' and '.join(map(str, sorted(stated)))} in the file's metadata, but "
                f"{'only some' if len(magnitudes) > 1 else 'all' if True in magnitudes else 'none'} of its layers have "
                f"DoRA's tensor, {MAGNITUDE}; all parts must have it, or none."
            )
        return options | ({"use_dora": True} if True in stated else {})

"""LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353) through PEFT."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from agsm_rl.adapters.lora_export import layers_of
from agsm_rl.adapters.lora_ranks import (
    LoraScale,
    check_alphas,
    options_of_export,
    peft_scale,
    scale_of_options,
    scales_of_export,
)
from agsm_rl.adapters.peft_adapter import TARGETS, PeftAdapter
from agsm_rl.adapters.peft_layers import MAGNITUDE
from agsm_rl.errors import UserError
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt

ALPHA = "lora_alpha"
"""PEFT's name of alpha."""


class LoRA(PeftAdapter):
    """Low-rank additions (alpha / rank)·B·A to linear layers; B starts at 0, so training starts from the base model.

    Args:
        rank: Rank of the additions, 1 or more.
        alpha: Scale times rank. Null means the rank: a scale of 1, as in diffusers' own training scripts.
        use_rslora: Scale by alpha / √rank (rsLoRA), which keeps high ranks from learning too little. Needs `alpha`.
        use_dora: Also train the length of each row of the changed weight, m·(W + B·A) / |W + B·A| (DoRA). Slower, and
            needs memory for each changed weight; useful at low ranks.
        rank_pattern: Ranks of the modules whose names end so, such as `{attn2.to_k: 32}`; by default all have `rank`.
        alpha_pattern: Likewise for alpha.
        banks: 1 uses the same bank for positive and negative prompts; 2 gives the negative prompts a separate bank.
        target_modules: Name suffixes of the denoiser's modules to change. The default is the attention projections, as
            in diffusers' scripts and DDPO; FLUX.2 adds its fused ones, for which write longer names (attn.to_q, …) to
            leave them out. It leaves out those of SD3's text stream (add_q_proj, add_k_proj, add_v_proj, to_add_out).
        text_encoders: Also change the attention projections of the CLIPs, with the same rank and alpha. Prompts are
            then re-encoded for each prediction. Layers that do not affect the output (the last of SDXL's first CLIP)
            are left out. SD3's T5 is never changed: `pipe.load_lora_weights` cannot load a LoRA for it.
        seed: Seed of the initial A, drawn from N(0, 1 / rank²).
        guidance_bank: Bank of guidance's unconditional branch wherever pictures are drawn with this LoRA; kept in the
            exported file. `negative` needs `banks: 2`, and is not for `text_encoders: true`.
        guidance_prompt: Prompt of that branch, `empty`, or with `guidance_bank: negative` also the `same` prompt.
    """

    kind: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    scale: LoraScale

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        banks: int = 1,
        target_modules: tuple[str, ...] = TARGETS,
        text_encoders: bool = False,
        seed: int = 0,
        guidance_bank: GuidanceBank = "positive",
        guidance_prompt: GuidancePrompt = "empty",
    ) -> None:
        self.scale = scale_of_options(self.kind, rank, alpha, rank_pattern, alpha_pattern, rslora=use_rslora)
        self.rank, self.alpha, self.use_dora = self.scale.rank, self.scale.alpha, use_dora
        super().__init__(
            banks=banks,
            target_modules=target_modules,
            text_encoders=text_encoders,
            seed=seed,
            guidance_bank=guidance_bank,
            guidance_prompt=guidance_prompt,
        )
        self.only_adds, self.needs_weights = not use_dora, use_dora

    def _config(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> Any:
        from peft import LoraConfig  # a recipe is checked before PEFT is loaded, which takes seconds

        return LoraConfig(**self._described(part, targets, layers), init_lora_weights="gaussian")

    def _described(self, part: str, targets: Sequence[str], layers: Mapping[str, str]) -> dict[str, Any]:
        scale = peft_scale(self.scale, part, layers, alpha=ALPHA)
        return scale | {"target_modules": list(targets)} | ({"use_dora": True} if self.use_dora else {})

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
        options = options_of_export(tensors, configs, title=cls.title, kind="LORA", alpha=ALPHA)
        scales = scales_of_export(configs, title=cls.title, kind="LORA", alpha=ALPHA)
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

    def _check_export(self, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> None:
        scales = scales_of_export(configs, title=self.title, kind="LORA", alpha=ALPHA)
        check_alphas(self.scale, tensors, scales, self.title)

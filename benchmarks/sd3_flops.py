"""FLOPs and bytes of Stable Diffusion 3 Medium's parts at their real sizes, counted on tensors without storage.

    python benchmarks/sd3_flops.py

This takes a few seconds and no weights, because torch's counter needs only the shapes of each product. docs/scale.md
uses the figures, which go to benchmarks/results/sd3_flops.json. A product of [m, k] and [k, n] counts 2·m·k·n.
"""

from collections.abc import Callable
from typing import Any

import torch
import typer
from full_size_models import make_sd3
from measure import write_result
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import backbone_of

TEXT_ROWS = 77 + 256
"""The rows of CLIP and of T5."""


def count(run: Callable[[], Any]) -> float:
    """FLOPs of a run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def denoiser(transformer: Any, side: int) -> dict[str, float]:
    """One row forward, and backward to its text without weights' gradients, as soft tokens (and nearly LoRA) need."""
    text = torch.empty(1, TEXT_ROWS, 4096, requires_grad=True)
    predictions: list[torch.Tensor] = []

    def forward() -> None:
        given = {"timestep": torch.empty(1), "pooled_projections": torch.empty(1, 2048)}
        latents = torch.empty(1, 16, side, side)
        predictions.append(transformer(latents, encoder_hidden_states=text, return_dict=False, **given)[0])

    return {"denoiser_forward": count(forward), "denoiser_backward": count(lambda: predictions[0].sum().backward())}


def main() -> None:
    """Count, print and record."""
    with torch.device("meta"):
        pipeline = make_sd3()
        pipeline.transformer.requires_grad_(False)
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
        vit_h = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
                patch_size=14,
            )
        )  # fmt: skip
        ids = torch.zeros(1, 77, dtype=torch.long)
        parts = {
            "clip_l_text": count(lambda: pipeline.text_encoder(ids)),
            "clip_g_text": count(lambda: pipeline.text_encoder_2(ids)),
            "t5_xxl_text_256": count(lambda: t5(torch.zeros(1, 256, dtype=torch.long))),
            "vit_h_14_image_224": count(lambda: vit_h(torch.empty(1, 3, 224, 224))),
        }
        by_resolution = {}
        for resolution in (512, 1024):
            side = resolution // 8
            latents = torch.empty(1, 16, side, side)
            by_part = denoiser(pipeline.transformer, side)
            by_part["vae_decode"] = count(lambda latents=latents: pipeline.vae.decode(latents))
            pixels = torch.empty(1, 3, resolution, resolution)
            by_part["vae_encode"] = count(lambda pixels=pixels: pipeline.vae.encode(pixels))
            by_resolution[str(resolution)] = by_part
        trained = {}
        for name, adapter in {"soft_tokens_4": SoftTokens(num_tokens=4), "lora_rank_32": LoRA(rank=32)}.items():
            adapter.attach(backbone_of(pipeline, resolution=512))
            trained[name] = sum(parameter.numel() for _, parameter in adapter.named_parameters())
            adapter.detach()
    write_result(
        "sd3_flops",
        what="FLOPs of one image or one prompt through Stable Diffusion 3 Medium's parts at full size, text of "
        f"{TEXT_ROWS} rows; T5 XXL and a ViT-H/14 reward tower beside them",
        device="cpu",
        denoiser_parameters=sum(parameter.numel() for parameter in pipeline.transformer.parameters()),
        trained_parameters=trained,
        flops=parts,
        flops_by_resolution=by_resolution,
    )


if __name__ == "__main__":
    typer.run(main)

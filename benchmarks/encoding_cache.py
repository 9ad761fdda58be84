"""What the encoding cache takes on disk at published sizes, what it saves, and what dropping padding would change.

    python benchmarks/encoding_cache.py

Bytes are the sizes of Arrow files that the cache writes from random tensors of the real shapes (SD1.5 at 512 px, SD3 at
1024 px), with five captions per image as in COCO. Sizes depend neither on the values nor on the captions' lengths,
because no row of the text is dropped. torch counts operations at the real sizes, without weights. Padding and seconds
are measured on the embedded bases. The figures go to benchmarks/results/encoding_cache.json.
"""

import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import datasets
import numpy as np
import torch
import typer
from full_size_models import clip, make_sd3, make_sd15
from measure import write_result
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.interfaces import Cond
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.shapes import data
from agsm_rl.sources import cache
from agsm_rl.sources.pairs import Pairs

COCO_IMAGES, COCO_CAPTIONS = 118_287, 591_753
PUBLISHED = {"sd15": 1.1e12, "sd3": 9.1e12}
"""Bytes that SoftREPA's preparation of COCO train2017 needs."""
CAPTIONS_AN_IMAGE = 5
WORDS = ("a", "the", "man", "woman", "dog", "red", "two", "sitting", "standing", "on", "near", "with", "of", "table")


class OneProcess:
    """The only process of a run."""

    index, count = 0, 1

    def gather(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values


class RandomEncoders:
    """A stand-in for a backbone, as the cache sees it: random encodings in a published model's shapes.

    SD3's CLIPs fill half of the width, and the rows of a missing T5 are zeros, as in diffusers.
    """

    def __init__(
        self, base: str, latents: tuple[int, int, int], width: int, clips: int, pooled: int, t5: int, t5_rows: int
    ):
        self.name, self.latent_shape, self.resolution, self.device = base, latents, 32, torch.device("cpu")
        self.width, self.clips, self.pooled, self.t5, self.t5_rows = width, clips, pooled, t5, t5_rows

    def identity(self, of: str) -> str:
        """Its name."""
        return f"{self.name} {of}"

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w]."""
        return torch.randn(len(images), *self.latent_shape)

    def encode_text(self, prompts: list[str]) -> Cond:
        """The CLIPs' 77 rows, followed by the T5's."""
        embeds = torch.zeros(len(prompts), 77 + self.t5_rows, self.width)
        embeds[:, :77, : self.clips].normal_()
        embeds[:, 77:, : self.t5].normal_()
        pooled = torch.randn(len(prompts), self.pooled) if self.pooled else None
        return Cond(embeds, pooled, tuple(prompts))


BASES = {
    "sd15": RandomEncoders("sd15", (4, 64, 64), 768, 768, 0, 0, 0),
    "sd3": RandomEncoders("sd3", (16, 128, 128), 4096, 2048, 2048, 4096, 256),
    "sd3, t5_length 77": RandomEncoders("sd3-77", (16, 128, 128), 4096, 2048, 2048, 4096, 77),
    "sd3 without its T5": RandomEncoders("sd3-0", (16, 128, 128), 4096, 2048, 2048, 0, 256),
}


def write_pairs(file: Path, images: int) -> None:
    """Write a parquet file of `images` pictures, with one row per caption of 8 to 12 words."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {"image": [], "caption": []}
    for image in range(images):
        png = BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(png, format="PNG")
        for _ in range(CAPTIONS_AN_IMAGE):
            rows["image"].append({"bytes": png.getvalue(), "path": None})
            rows["caption"].append(" ".join([*rng.choice(WORDS, rng.integers(7, 12)), str(image)]))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))


def measure_bytes(base: str, images: int) -> dict[str, Any]:
    """Bytes per caption in the cache's files."""
    with tempfile.TemporaryDirectory() as folder:
        file, there = Path(folder) / "pairs.parquet", Path(folder) / "cache"
        write_pairs(file, images)
        cache.cache_folder = lambda: there
        source = Pairs(str(file), 16, cache="all")
        source.bind("pairs", 0, OneProcess())
        source.next(SimpleNamespace(backbone=BASES[base], adapters={}))  # type: ignore[arg-type]
        captions = len(set(datasets.Dataset.from_parquet(str(file))["caption"]))
        size = {
            kind: sum(arrow.stat().st_size for arrow in there.glob(f"{kind}-*/**/*.arrow"))
            for kind in ("latents", "text")
        }
    published = PUBLISHED[base[:4].rstrip(",").strip()] / COCO_CAPTIONS
    figures: dict[str, Any] = {"images": images, "captions": captions, "softrepa_bytes_a_caption": round(published)}
    for name, kinds in {"latents": ["latents"], "all": ["latents", "text"]}.items():
        each = sum(size[kind] for kind in kinds) / captions
        figures[f"cache: {name}"] = {
            "bytes_a_caption": round(each),
            "share_of_softrepa": f"1/{published / each:.0f}",
            "coco_gb": round(each * COCO_CAPTIONS / 1e9, 1),
        }
    figures["bytes_an_image"] = round(size["latents"] / images)
    return figures


def flops(module: nn.Module, **inputs: Tensor) -> float:
    """Floating-point operations of a forward pass, in 10⁹ (a multiplication and an addition are two)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    return round(counter.get_total_flops() / 1e9, 1)


def count_operations() -> dict[str, float]:
    """Operations (10⁹) to encode a caption or an image, and for a prediction of the denoiser."""
    with torch.device("meta"):
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
        small, large = clip(768, 12, 12), clip(1280, 32, 20, projection=1280, act="gelu")
        sd15, sd3 = make_sd15(), make_sd3()
        tokens, t = torch.zeros(1, 77, dtype=torch.long), torch.zeros(1)
        operations = {
            "sd15 text: CLIP-L": flops(small, input_ids=tokens),
            "sd15 image: VAE encoder, 512 px": flops(sd15.vae.encoder, sample=torch.zeros(1, 3, 512, 512)),
            "sd15 U-Net, 512 px": flops(
                sd15.unet, sample=torch.zeros(1, 4, 64, 64), timestep=t, encoder_hidden_states=torch.zeros(1, 77, 768)
            ),
            "sd3 text: CLIP-L and CLIP-G": round(flops(small, input_ids=tokens) + flops(large, input_ids=tokens), 1),
            "sd3 text: T5-XXL, 256 tokens": flops(t5, input_ids=torch.zeros(1, 256, dtype=torch.long)),
            "sd3 image: VAE encoder, 1024 px": flops(sd3.vae.encoder, sample=torch.zeros(1, 3, 1024, 1024)),
            "sd3 transformer, 1024 px": flops(
                sd3.transformer.to("meta"),
                hidden_states=torch.zeros(1, 16, 128, 128),
                timestep=t,
                encoder_hidden_states=torch.zeros(1, 333, 4096),
                pooled_projections=torch.zeros(1, 2048),
            ),
        }
    return operations


def distance(value: Tensor, other: Tensor) -> float:
    """‖value − other‖ / ‖value‖."""
    return float((value - other).norm() / value.norm())


@torch.no_grad()
def look_at_padding(base: str, captions: int = 32) -> dict[str, Any]:
    """On an embedded base: how padding differs between captions, and how dropping it changes a prediction."""
    backbone = load_backbone(f"builtin:{base}", device="cpu")
    prompts = data.prompts("held_out", captions, seed=0)
    cond, empty = backbone.encode_text(prompts), backbone.encode_text([" "])  # SDXL's "" is zeros
    padding = padding_rows(backbone, prompts)
    same = (cond.embeds.bfloat16() == cond.embeds[:1].bfloat16()).all(dim=2).all(dim=0)
    others = cond.embeds.roll(1, dims=0)
    shared = padding & padding.roll(1, dims=0)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(captions, *backbone.latent_shape, generator=generator)
    t = torch.full((captions,), 0.6)
    predicted = backbone.predict(x_t, t, cond)

    def change(embeds: Tensor) -> float:
        return distance(predicted, backbone.predict(x_t, t, Cond(embeds, cond.pooled)))

    return {
        "rows": cond.embeds.shape[1],
        "padding_rows_on_average": round(float(padding.sum() / captions), 1),
        "rows_that_all_captions_share_in_bfloat16": int(same.sum()),
        "difference_between_two_captions_padding": round(distance(cond.embeds[shared], others[shared]), 4),
        "prediction_changes_by": {
            "text_rounded_to_bfloat16": round(change(cond.embeds.bfloat16().float()), 6),
            "padding_of_the_empty_prompt": round(change(torch.where(padding[..., None], empty.embeds, cond.embeds)), 6),
            "padding_zero": round(change(cond.embeds * ~padding[..., None]), 6),
        },
    }


def padding_rows(backbone: Any, prompts: list[str]) -> Tensor:
    """Which rows [B, S] of the encoded prompts are padding, after each tokenizer's end token."""
    pipeline, masks = backbone.pipeline, []
    for name in ("tokenizer", "tokenizer_3"):  # SD3's two CLIPs share their rows
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            length = backbone.t5_length if name == "tokenizer_3" else tokenizer.model_max_length
            ends = torch.tensor([[len(ids)] for ids in tokenizer(prompts).input_ids])
            masks.append(torch.arange(length) >= ends)
    return torch.cat(masks, dim=1)


def measure_seconds(rounds: int) -> dict[str, Any]:
    """Medians on the embedded SD1.5 base, batch 8: for a batch with its text, and for a whole AGSM step, in turn."""
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache.cache_folder = lambda: Path(folder)
        trainers = {}
        for kept in (None, "latents", "all"):
            policy = Policy(load_backbone("builtin:shapes-sd15", device="cpu"), {"tokens": SoftTokens()})
            source = Pairs("builtin:shapes", 8, num_images=64, cache=kept)
            trainers[kept] = Trainer(policy, [Term(AGSM(), source, name="agsm")], steps=10**6)
            trainers[kept].run_step()  # fills the cache
        for _ in range(rounds):
            for kept, trainer in trainers.items():
                of_cache = seconds.setdefault(str(kept), {"batch": [], "step": []})
                began = time.perf_counter()
                trainer.terms[0].source.next(trainer.policy).encode_text(trainer.policy.backbone)
                of_cache["batch"].append(time.perf_counter() - began)
                began = time.perf_counter()
                trainer.run_step()
                of_cache["step"].append(time.perf_counter() - began)
    medians = {
        kept: {key: statistics.median(values) for key, values in times.items()} for kept, times in seconds.items()
    }
    return {
        f"cache: {kept}": {key: round(value / medians["None"][key], 3) for key, value in times.items()}
        for kept, times in medians.items()
    } | {"what": "seconds as a share of those without a cache", "rounds": rounds}


def main(
    images: Annotated[
        int, typer.Option(min=16, help="images with five captions each; SD3 temporarily takes 12.5 MB per image")
    ] = 32,
    rounds: Annotated[int, typer.Option(min=3, help="rounds of timing")] = 9,
) -> None:
    """Measure everything and record it."""
    datasets.disable_progress_bars()
    write_result(
        "encoding_cache",
        what="the encoding cache: bytes per caption (random tensors of the real shapes), operations, padding, seconds",
        device="cpu",
        softrepa={"coco_images": COCO_IMAGES, "coco_captions": COCO_CAPTIONS, "bytes": PUBLISHED},
        bytes={base: measure_bytes(base, images) for base in BASES},
        operations_in_billions=count_operations(),
        padding={base: look_at_padding(base) for base in ("shapes-sd15", "shapes-sdxl", "shapes-sd3")},
        seconds=measure_seconds(rounds),
    )


if __name__ == "__main__":
    typer.run(main)

"""The predictions in docs/models.md: what each model needs in training, by method and by quantisation.

    python benchmarks/model_memory.py [sd15 sana …]     predicts these models (all), keeps the figures of the others
    python benchmarks/model_memory.py --table           only writes the table into docs/models.md again

Each model is its published configuration, without weights (config_only.py); nothing is measured. The figures go to
benchmarks/results/model_memory.json.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from config_only import write_folder
from full_size_models import MAKERS, make_sd3

from agsm_rl.doctor.memory.fit import MARGIN
from agsm_rl.doctor.memory.predict import predict
from agsm_rl.recipe.recipe import Recipe

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))  # where each newer kind keeps its published configuration
from tiny import KINDS, tiny  # noqa: E402

RESULTS, PAGE = HERE / "results" / "model_memory.json", HERE.parent / "docs" / "models.md"
BEGIN, END = "<!-- made by benchmarks/model_memory.py -->", "<!-- end -->"
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141)
"""GB of memory of the usual cards."""
NAMES = {
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3 Medium",
    "sana": "SANA 1.6B",
    "z_image": "Z-Image",
    "flux_2": "FLUX.2 [klein] 4B",
    "flux": "FLUX.1 [dev]",
    "qwen_image": "Qwen-Image",
}
MODELS = {**MAKERS, "sd3": partial(make_sd3, t5=True)}
"""Those that are no kind of tests/tiny."""
METHODS = {"agsm": "AGSM", "ddpo": "DDPO-class", "diffusion_nft": "NFT-class"}
QUANTISED = (None, "nf4")


def recipe(checkpoint: Path, method: str, quantize: str | None, prompts: Path) -> Recipe:
    """The method at rank 32 with the smallest passes: bfloat16, checkpointing, prompts encoded once."""
    source: dict[str, Any] = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2, "num_images": 2}
    term: dict[str, Any] = {"group_size": 2, "groups_per_pass": 1}
    if method != "agsm":
        source = {"use": "rollouts", "prompts": str(prompts), "rewards": {"brightness": 1.0}, "num_prompts": 1}
        source |= {"images_per_prompt": 2, "num_steps": 4, "guidance": 4.0, "sample_batch_size": 1}
        term = {"images_per_pass": 1} if method == "ddpo" else {"rows_per_pass": 1}
    backbone = {"use": "auto", "checkpoint": str(checkpoint), "device": "cpu", "dtype": "bfloat16"}
    backbone |= {"gradient_checkpointing": True, "text": {"keep": "cache"}, "quantize": quantize}
    return Recipe.from_data(
        {
            "steps": 2,
            "backbone": backbone,
            "adapters": {"lora": {"use": "lora", "rank": 32}},
            "objectives": [{"use": method, "source": source, **term}],
            "track": [],
        }
    )


def figures(kind: str) -> dict[str, Any]:
    """Predictions in GiB by method and quantisation."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red star\na blue circle beside two green squares\n")
        with torch.device("meta"):
            pipeline = MODELS[kind]() if kind in MODELS else tiny(kind).make_full_size()
        checkpoint = write_folder(pipeline, Path(folder) / kind)
        denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        found: dict[str, Any] = {"billions": sum(weight.numel() for weight in denoiser.parameters()) / 1e9}
        for method in METHODS:
            for quantize in QUANTISED:
                trainer, prediction = predict(recipe(checkpoint, method, quantize, prompts))
                if isinstance(prediction, str):
                    raise SystemExit(f"{kind}, {method}, {quantize}: {prediction}")
                found["resolution"] = trainer.policy.backbone.resolution
                peak = {"gib": round(prediction.peak / 2**30, 2), "phase": prediction.phase}
                found.setdefault(method, {})[quantize or "bfloat16"] = peak
                print(f"{kind} {method} {quantize}: {peak}", flush=True)
        return found


def card_for(gib: float) -> str:
    """The smallest of the usual cards that leaves MARGIN free."""
    return next((f"{card} GB" for card in CARDS if gib * (1 + MARGIN) <= card), "none")


def make_table(results: dict[str, Any]) -> str:
    """The table as Markdown: a row per model and quantisation."""
    head = ["model", "denoiser", "pixels", "`quantize`", *METHODS.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in (kind for kind in NAMES if kind in results):
        of_kind = results[kind]
        for number, quantize in enumerate(quantize or "bfloat16" for quantize in QUANTISED):
            first = (
                [NAMES[kind], f"{of_kind['billions']:.1f} B", str(of_kind["resolution"])] if not number else [""] * 3
            )
            peaks = [of_kind[method][quantize]["gib"] for method in METHODS]
            cells = [f"{peak:.1f} GiB, {card_for(peak)}" for peak in peaks]
            lines.append("| " + " | ".join([*first, quantize if number else "none (bfloat16)", *cells]) + " |")
    return "\n".join(lines) + "\n"


def put_in(text: str, table: str) -> str:
    """`text` with the part between the marks replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}"


def main(
    kinds: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NAMES)}.")] = None, table: bool = False
) -> None:
    """Predict, and write the table."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for kind in [] if table else kinds or [kind for kind in NAMES if kind in MODELS or kind in KINDS]:
        results[kind] = figures(kind)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(put_in(PAGE.read_text(), make_table(results)))


if __name__ == "__main__":
    typer.run(main)

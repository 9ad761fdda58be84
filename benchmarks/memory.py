"""Predicted against measured peaks of memory, on the CPU.

    python benchmarks/memory.py                 the embedded bases, many settings
    python benchmarks/memory.py --mid-size      a random U-Net of SD1.5's architecture, a quarter as wide, at 256 px

`measured_mib` is the peak of the CPU allocator's memory in a step, from torch's profiler, plus the weights and
optimiser state that exist before the step. Each case runs in a separate process; `resident_mib` is the growth of its
resident memory from before the weights were loaded to the peak. The prediction is `agsm-rl check`'s, for training steps
only. Nothing was measured on a GPU. The figures go to benchmarks/results/memory_<what>_cpu.json.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import allocator_peak, resident_bytes, write_result

from agsm_rl.doctor.memory.predict import always_in_use, predict
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe

LORA = {"lora": {"use": "lora", "rank": 8, "banks": 2}}


def pairs(batch_size: int = 8) -> dict[str, Any]:
    """A source of drawings."""
    return {"use": "pairs", "dataset": "builtin:shapes", "batch_size": batch_size, "num_images": batch_size}


def rollouts(**options: Any) -> dict[str, Any]:
    """A source of images drawn by the policy."""
    common = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"brightness": 1.0}, "num_steps": 4}
    common |= {"graph_memory": 0.0}  # what is kept where there is room is not predicted
    return {**common, "num_prompts": 4, "images_per_prompt": 4, "guidance": 3.0, **options}


def embedded() -> dict[str, dict[str, Any]]:
    """Cases on the embedded bases."""
    sd15, sdxl, sd3 = (f"builtin:shapes-{kind}" for kind in ("sd15", "sdxl", "sd3"))
    return {
        "agsm": case("agsm", pairs(), sd15),
        "agsm, groups_per_pass 1": case("agsm", pairs(), sd15, groups_per_pass=1),
        "agsm, checkpointing": case("agsm", pairs(), sd15, checkpointing=True),
        "agsm, soft tokens": case("agsm", pairs(), sd15, adapters={"tokens": {"use": "soft_tokens"}}),
        "softrepa": case("softrepa", pairs(), sd15),
        "softrepa, groups_per_pass 1": case("softrepa", pairs(), sd15, groups_per_pass=1),
        "ddpo": case("ddpo", rollouts(), sd15),
        "ddpo, images_per_pass 4": case("ddpo", rollouts(), sd15, images_per_pass=4),
        "ddpo, images_per_pass 1, sample_batch_size 4": case(
            "ddpo", rollouts(sample_batch_size=4), sd15, images_per_pass=1
        ),
        "ddpo, checkpointing": case("ddpo", rollouts(), sd15, checkpointing=True),
        "reward_backprop": case(
            "reward_backprop",
            {"use": "prompts", "prompts": "builtin:shapes-prompts", "batch_size": 4},
            sd15,
            rewards={"brightness": 1.0},
            num_steps=4,
        ),
        "agsm on SDXL": case("agsm", pairs(), sdxl),
        "ddpo on SDXL, checkpointing": case("ddpo", rollouts(), sdxl, checkpointing=True),
        "agsm on SD3": case("agsm", pairs(4), sd3, t5_length=20),
        "flow_grpo on SD3, images_per_pass 4": case("flow_grpo", rollouts(), sd3, t5_length=20, images_per_pass=4),
    }


def mid_size(checkpoint: str) -> dict[str, dict[str, Any]]:
    """Cases on the random U-Net."""
    few = rollouts(num_prompts=2, images_per_prompt=2, num_steps=2, sample_batch_size=2)
    return {
        "agsm": case("agsm", pairs(4), checkpoint, group_size=2),
        "agsm, groups_per_pass 1": case("agsm", pairs(4), checkpoint, group_size=2, groups_per_pass=1),
        "agsm, checkpointing": case("agsm", pairs(4), checkpoint, group_size=2, checkpointing=True),
        "softrepa": case("softrepa", pairs(4), checkpoint, group_size=2),
        "ddpo": case("ddpo", few, checkpoint),
        "ddpo, images_per_pass 1": case("ddpo", few, checkpoint, images_per_pass=1),
        "ddpo, checkpointing": case("ddpo", few, checkpoint, checkpointing=True),
    }


def case(
    use: str,
    source: dict[str, Any],
    checkpoint: str,
    *,
    checkpointing: bool = False,
    adapters: dict[str, Any] | None = None,
    t5_length: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A recipe with one term."""
    backbone = {"use": "stable_diffusion", "checkpoint": checkpoint, "device": "cpu", "t5_length": t5_length}
    return {
        "steps": 2,
        "backbone": {**backbone, "gradient_checkpointing": checkpointing},
        "adapters": adapters or LORA,
        "objectives": [{"use": use, "source": source, **options}],
        "track": [],
    }


def make_mid_size(folder: Path) -> str:
    """Write the random pipeline to a folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from agsm_rl.shapes.train_base.layouts import assemble_sd15
    from agsm_rl.shapes.train_base.text import make_tokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, attention_head_dim=8,
        norm_num_groups=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, sample_size=256,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=3, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    assemble_sd15(vae, text, tokenizer=tokenizer, unet=unet).save_pretrained(folder)
    return str(folder)


def measure(data: dict[str, Any]) -> dict[str, Any]:
    """Predict a case, then run it."""
    torch.set_num_threads(1)
    recipe = Recipe.from_data(data)
    began = time.process_time()
    _, prediction = predict(recipe)
    seconds = time.process_time() - began
    assert not isinstance(prediction, str), prediction
    peaks = {phase: peak for phase, peak in prediction.peaks.items() if phase.startswith(("drawing ", "learning "))}
    before = resident_bytes()
    trainer = build_trainer(recipe)
    trainer.run_step()
    grown = resident_bytes(peak=True) - before
    measured = allocator_peak(trainer.run_step) + sum(always_in_use(trainer).values())
    return {
        "predicted_mib": round(max(peaks.values()) / 2**20, 1),
        "measured_mib": round(measured / 2**20, 1),
        "ratio": round(max(peaks.values()) / measured, 3),
        "resident_mib": round(grown / 2**20, 1),
        "phase": max(peaks, key=lambda phase: peaks[phase]),
        "prediction_cpu_seconds": round(seconds, 2),
    }


def main(
    mid: Annotated[bool, typer.Option("--mid-size", help="use the random U-Net instead of the embedded bases")] = False,
) -> None:
    """Run the cases and record them."""
    # Forked, so that libraries are imported only once; each process still has a peak of its own.
    processes = multiprocessing.get_context("fork")
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = mid_size(make_mid_size(Path(folder) / "base")) if mid else embedded()
        for name, data in cases.items():
            with processes.Pool(1) as pool:
                measured[name] = pool.apply(measure, (data,))
            print(name, measured[name], flush=True)
    write_result(
        f"memory_{'mid_size' if mid else 'embedded'}_cpu",
        what="peak memory of a training step, predicted and measured, float32, LoRA of rank 8 with two banks; "
        + ("a random U-Net of SD1.5's architecture, widths 80 to 320, 256 px" if mid else "the embedded bases"),
        device="cpu",
        cases=measured,
    )


if __name__ == "__main__":
    typer.run(main)

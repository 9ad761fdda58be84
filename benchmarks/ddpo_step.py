"""Our DDPO against TRL 0.11.4's DDPOTrainer: images sampled and trained per second.

    python benchmarks/ddpo_step.py [--device cpu | cuda] [--checkpoint FOLDER]

TRL runs in a separate environment, which uv creates once from trl_worker.lock, with the same versions of torch,
diffusers, transformers, peft and accelerate. Each side is a process that works only on request, and they take turns.
Both have the same pipeline folder, prompts, reward (mean brightness), LoRA (rank and alpha 4, which TRL fixes),
sampling steps, guidance and batches. A step draws all images, scores them and takes one optimiser step on all of them.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import measure
import typer
from agsm_rl_rewards.brightness import Brightness
from agsm_rl_rewards.worker.environment import python_for
from bases import EMBEDDED, options_of

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.loading import find_checkpoint
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.sources.prompt_lists import read_prompts
from agsm_rl.sources.rollouts import Rollouts

TRL_WORKER = Path(__file__).with_name("trl_worker.py")


def make_trainer(settings: dict[str, Any], prompts: Path) -> Trainer:
    """Our trainer with the settings that TRL gets; the prompts are written to the file `prompts`."""
    prompts.write_text("\n".join(settings["prompts"]) + "\n")
    dtype = "bfloat16" if settings["device"] == "cuda" else "float32"
    backbone = load_backbone(settings["checkpoint"], device=settings["device"], dtype=dtype)
    source = Rollouts(
        str(prompts),
        [(Brightness(), 1.0)],
        num_prompts=len(settings["prompts"]),
        images_per_prompt=1,
        num_steps=settings["num_steps"],
        guidance=settings["guidance"],
        sample_batch_size=settings["sample_batch_size"],
        keep_graph=settings["keep_graph"],
    )
    objective = DDPO(images_per_pass=settings["train_batch_size"], **settings["ddpo"])
    policy = Policy(backbone, {"lora": LoRA(rank=4)})
    return Trainer(policy, [Term(objective, source, name="ddpo")], steps=1, learning_rate=3e-4)


def serve_ours(settings: dict[str, Any]) -> None:
    """Run as our side's worker."""
    with tempfile.TemporaryDirectory() as folder:
        trainers: list[Trainer] = []

        def step() -> None:
            if not trainers:
                trainers.append(make_trainer(settings, Path(folder) / "prompts.txt"))
            trainers[0].run_step()

        measure.serve(step, settings["device"])


def main(
    checkpoint: str = EMBEDDED,
    device: Literal["cpu", "cuda"] = "cpu",
    images: Annotated[int, typer.Option(min=1, help="images per optimiser step, each of a different prompt")] = 16,
    num_steps: Annotated[int, typer.Option(min=1, help="sampling steps; all are learned from")] = 10,
    guidance: float = 5.0,
    sample_batch_size: Annotated[int | None, typer.Option(help="images drawn at once; default: all")] = None,
    train_batch_size: Annotated[int | None, typer.Option(help="images learned from at once; default: the same")] = None,
    ddpo: Annotated[list[str], typer.Option(help="key=value for our objective")] = [],  # noqa: B006 — typer's way
    keep_graph: Annotated[bool, typer.Option(help="our rollouts keep the graph of their draw")] = False,
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    warmup: Annotated[int, typer.Option(min=1)] = 1,
    results: Path = measure.RESULTS,
    serve: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure and record."""
    if serve is not None:
        return serve_ours(json.loads(serve))
    sample_batch_size = sample_batch_size or images
    train_batch_size = train_batch_size or sample_batch_size
    if images % sample_batch_size or sample_batch_size % train_batch_size:
        raise typer.BadParameter(
            "images must be a multiple of sample_batch_size, which must be a multiple of train_batch_size"
        )
    settings = {
        "checkpoint": find_checkpoint(checkpoint),
        "device": device,
        "prompts": list(dict.fromkeys(prompt.text for prompt in read_prompts("builtin:shapes-prompts")))[:images],
        "num_steps": num_steps,
        "guidance": guidance,
        "sample_batch_size": sample_batch_size,
        "train_batch_size": train_batch_size,
        "keep_graph": keep_graph,
    }
    workers = {
        "ours": [sys.executable, __file__, "--serve", json.dumps(settings | {"ddpo": options_of(ddpo)})],
        "trl": [str(python_for(TRL_WORKER)), str(TRL_WORKER), json.dumps(settings)],
    }
    sides = {name: measure.Worker(command) for name, command in workers.items()}
    try:
        taken = measure.interleave(
            {name: worker.step for name, worker in sides.items()}, repeats=repeats, warmup=warmup
        )
        flops = {name: worker.ask("flops") for name, worker in sides.items()}
        peaks = {name: worker.ask("peak") for name, worker in sides.items()}
        versions = sides["trl"].ask("software")
    finally:
        for worker in sides.values():
            worker.close()
    step = measure.compare_seconds(taken["ours"], taken["trl"])
    embedded = checkpoint == EMBEDDED
    measure.write_result(
        f"ddpo_step_{'embedded' if embedded else 'other'}_{device}{'_keep_graph' * keep_graph}",
        what=f"DDPO, {images} images x {num_steps} sampling steps, guidance {guidance:g}, {sample_batch_size} images "
        f"drawn and {train_batch_size} learned from at once" + ", our graph of the draw kept" * keep_graph,
        device=device,
        results=results,
        comparisons={
            "step": step,
            "memory": measure.compare_amounts(peaks["ours"], peaks["trl"], unit="bytes"),
            "flops": measure.compare_amounts(flops["ours"], flops["trl"], unit="FLOPs"),
        },
        figures={"images_a_second": {name: round(images / step[name], 3) for name in ("ours", "other")}},
        software_of_trl=versions | {"trl": "0.11.4"},
    )


if __name__ == "__main__":
    typer.run(main)

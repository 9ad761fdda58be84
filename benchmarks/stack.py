"""AGSM and DDPO stacked, compared with the sum of the two alone.

    python benchmarks/stack.py [--device cpu | cuda]

`rollouts`: both learn from one batch of the model's images (DDPO from all, AGSM from the best quarter), drawn and
scored once; alone, each draws its own. `pairs`: AGSM learns from captioned images instead, so only the step is shared.
Options are those of recipes/best_of_own_images.yaml and recipes/stacking/one_lora.yaml.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import measure
import typer
from agsm_rl_rewards.shapes import ShapesReward
from bases import EMBEDDED

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.rollouts import Rollouts
from agsm_rl.sources.views import BestImages


def make_terms(names: list[str], *, shared: bool, num_prompts: int) -> list[Term]:
    """The named terms; if `shared`, AGSM learns from the same rollouts as DDPO."""
    rollouts = Rollouts(
        "builtin:shapes-prompts", [(ShapesReward(), 1.0)], num_prompts=num_prompts, images_per_prompt=4, num_steps=10,
        guidance=1.0,
    )  # fmt: skip
    # Accept any advantage, so that each step does the same work.
    best = BestImages(share=0.25, min_advantage=-10.0) if shared else None
    captioned = rollouts if shared else Pairs("builtin:shapes", 8, num_images=512)
    known = {
        "ddpo": Term(DDPO(clip_range=1e-3), rollouts, name="ddpo", source_name="own_images"),
        "agsm": Term(AGSM(), captioned, name="agsm", view=best, source_name="own_images" if shared else None),
    }
    return [known[name] for name in names]


def make_trainers(*, shared: bool, num_prompts: int, device: str) -> dict[str, Trainer]:
    """The two alone and the stack, each with its own base."""
    trainers = {}
    for name, terms in {"agsm": ["agsm"], "ddpo": ["ddpo"], "stack": ["ddpo", "agsm"]}.items():
        policy = Policy(load_backbone(EMBEDDED, device=device), {"lora": LoRA(rank=8, banks=2)}, ema_decay=0.99)
        trainers[name] = Trainer(policy, make_terms(terms, shared=shared, num_prompts=num_prompts), steps=1)
    return trainers


def compare(*, shared: bool, num_prompts: int, device: str, repeats: int, warmup: int) -> dict[str, Any]:
    """The stack's step, compared with the sum of the two terms' steps."""
    trainers = make_trainers(shared=shared, num_prompts=num_prompts, device=device)
    sides = {name: measure.timed(trainer.run_step, device) for name, trainer in trainers.items()}
    taken = measure.interleave(sides, repeats=repeats, warmup=warmup)
    sums = [
        measure.Seconds(agsm.wall + ddpo.wall, agsm.cpu + ddpo.cpu)
        for agsm, ddpo in zip(taken["agsm"], taken["ddpo"], strict=True)
    ]
    return measure.compare_seconds(taken["stack"], sums, of="ours/other")


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    num_prompts: Annotated[int, typer.Option(min=4, help="prompts per draw, with 4 images each")] = 8,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    warmup: Annotated[int, typer.Option(min=0)] = 1,
    results: Path = measure.RESULTS,
) -> None:
    """Measure and record."""
    options = {"num_prompts": num_prompts, "device": device, "repeats": repeats, "warmup": warmup}
    measure.write_result(
        f"stack_embedded_{device}",
        what=f"{4 * num_prompts} images x 10 sampling steps, one optimiser step; AGSM over {num_prompts} of them, or "
        "over 8 captioned images",
        device=device,
        results=results,
        comparisons={"rollouts": compare(shared=True, **options), "pairs": compare(shared=False, **options)},
    )


if __name__ == "__main__":
    typer.run(main)

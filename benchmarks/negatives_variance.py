"""How much noise `negatives: k` adds to AGSM's gradient, on fixed batches of the shapes world.

    python benchmarks/negatives_variance.py

L⁻ is a mean over an image's negatives, so the gradient of each is computed by itself, once; the variance of a mean over
k of them, drawn without replacement, then follows exactly. It is compared with what the gradient of all negatives
differs by from batch to batch (other images, noise and noise levels), which a run meets anyway.
"""

from pathlib import Path
from typing import Annotated

import measure
import torch
import typer
from bases import EMBEDDED
from torch import Tensor

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.objectives.agsm import AGSM, guided_score_loss
from agsm_rl.objectives.grid import Grid
from agsm_rl.sources.pairs import Pairs
from agsm_rl.training.randomness import Draw

IMAGES, GROUP = 8, 4


def gradients_of_negatives(policy: Policy, objective: AGSM, grid: Grid) -> Tensor:
    """The gradient of each image's loss under each other prompt of its group, [B, P - 1, parameters]."""
    ema = grid.predict(policy.ema)
    own = torch.tensor(grid.is_own).reshape(grid.columns.shape)
    parameters = list(policy.parameters().values())
    rows: list[Tensor] = []
    for place in (~own).nonzero():
        learned = torch.zeros_like(own)
        learned[tuple(place)] = True
        live = grid.predict_some(policy.live, learned, rest=ema)
        options = {"own": grid.own, "negatives": grid.negatives, "learned": learned}
        loss = guided_score_loss(live, ema, grid.target, **options)[0]
        positive = guided_score_loss(live, ema, grid.target, gamma_negative=0.0, **options)[0]
        # The mean over images has one that is not 0.
        found = torch.autograd.grad(len(own) * (loss - positive), parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([value.flatten() for value in found]))
    return torch.stack(rows).unflatten(0, (len(own), -1))


def variance_of_choice(each: Tensor, count: int) -> float:
    """Variance, summed over parameters, of the mean over images of a mean over `count` of each image's negatives."""
    images, negatives = each.shape[:2]
    spread = each.var(dim=1).sum(dim=1)  # of one image's negatives, with the divisor n - 1
    return float((spread / count * (1 - count / negatives)).sum()) / images**2


def main(
    batches: Annotated[int, typer.Option(min=2)] = 12,
    steps: Annotated[int, typer.Option(min=0, help="steps that are trained before")] = 20,
    results: Path = measure.RESULTS,
) -> None:
    """Measure and record."""
    policy = Policy(load_backbone(EMBEDDED, device="cpu"), {"lora": LoRA(rank=8, banks=2)}, ema_decay=0.99)
    source, objective = Pairs("builtin:shapes", IMAGES, num_images=64 * IMAGES), AGSM(group_size=GROUP)
    trainer = Trainer(policy, [Term(objective, source, name="agsm")], steps=max(1, steps), learning_rate=1e-3)
    for _ in range(steps):
        trainer.run_step()
    totals, added = [], dict.fromkeys(range(1, GROUP), 0.0)
    for batch in range(batches):
        policy.draw = Draw(1, "agsm", batch)
        each = gradients_of_negatives(policy, objective, objective.groups.grid(policy, source.next(policy)))
        totals.append(each.mean(dim=(0, 1)))
        for count in added:
            added[count] += variance_of_choice(each, count) / batches
    all_negatives = torch.stack(totals)
    between = float(all_negatives.var(dim=0).sum())
    measure.write_result(
        "negatives_variance",
        what=f"{IMAGES} images x {GROUP} prompts, LoRA of rank 8 in 2 banks after {steps} steps; {batches} batches",
        device="cpu",
        results=results,
        comparisons={},
        figures={
            "mean_squared_norm": float(f"{float(all_negatives.square().sum(dim=1).mean()):.4g}"),
            "variance_between_batches": float(f"{between:.4g}"),
            "variance_added_by": {count: float(f"{value:.4g}") for count, value in added.items()},
            "share_of_the_variance_between_batches": {
                count: round(value / between, 4) for count, value in added.items()
            },
        },
    )


if __name__ == "__main__":
    typer.run(main)

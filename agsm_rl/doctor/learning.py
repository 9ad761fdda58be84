"""Sources and objectives: batches are sane, fresh rollouts have ratio 1, gradients reach every trained parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from agsm_rl.doctor.finding import Finding, green, red
from agsm_rl.interfaces import Batch, RewardedBatch, RolloutBatch
from agsm_rl.objectives.policy_gradient import step_log_prob
from agsm_rl.term import Term
from agsm_rl.trainer import Trainer
from agsm_rl.training.anomalies import REMEDY
from agsm_rl.training.gradients import largest_share, norm
from agsm_rl.training.randomness import Draw

RATIO_TOLERANCE = 1e-5
CLEARLY_OVER_HALF = 0.6
"""A single draw's share varies by a few percent, and Flow-GRPO's published noise lies at about one half."""
ROWS = 8
"""Number of a rollout's rows that are compared."""


def check_learning(trainer: Trainer) -> Iterator[Finding]:
    """Draw a batch from each source with the current parameters, and compute each term's gradient once."""
    batches: dict[str, Batch] = {}
    for name, source in trainer.sources.items():
        try:
            with trainer.accelerator.autocast():
                batches[name] = source.next(trainer.policy)
        except Exception as error:
            yield red(f"source '{name}'", f"it returns no batch: {error}", "fix what the message names")
            continue
        yield _check_batch(name, batches[name])
        batch = batches[name]
        if isinstance(batch, RolloutBatch):
            yield _check_ratio(trainer, name, batch)
    reached: dict[str, float] = {}
    for term in trainer.terms:
        for name, batch in batches.items():
            if trainer.sources[name] is term.source and term.weight:
                shares: dict[str, float] = {}
                yield _check_term(trainer, term, batch, reached, shares)
                if shares and trainer.watch.actions["step_share"] != "ignore":
                    yield _check_share(term.name, shares)
    yield from _check_reached(trainer, reached)


def _check_batch(name: str, batch: Batch) -> Finding:
    what = f"source '{name}'"
    tensors = {item.name: getattr(batch, item.name) for item in fields(batch)}
    bad = [key for key, value in tensors.items() if isinstance(value, Tensor) and not torch.isfinite(value).all()]
    if bad:
        return red(what, f"its {bad[0]} are not finite", "look at its images, and at the base's dtype")
    if isinstance(batch, RewardedBatch) and len(batch) > 1 and batch.rewards.max() == batch.rewards.min():
        return red(
            what,
            f"all {len(batch)} images drawn have the same reward, {batch.rewards[0]:.4g}: nothing to learn from them",
            "a denser reward, easier prompts, or a better base to begin with",
        )
    different = len(set(batch.prompts))
    return green(what, f"a batch of {len(batch)} rows, {different} different prompts, all finite")


@torch.no_grad()
def _check_ratio(trainer: Trainer, name: str, batch: RolloutBatch) -> Finding:
    few = batch.select(torch.arange(min(ROWS, len(batch))))
    off = 0.0
    for k in few.steps:
        with trainer.accelerator.autocast():
            now = step_log_prob(trainer.policy, few, k)
        off = max(off, float(((now - few.log_probs[:, k]).exp() - 1).abs().max()))
    what, detail = f"rollouts of '{name}'", f"probability ratio 1 ± {off:.1g} on a fresh draw"
    if off <= RATIO_TOLERANCE:
        return green(what, detail)
    return red(
        what,
        detail + f", more than {RATIO_TOLERANCE:g}",
        "drawing and learning disagree: check for another dtype, dropout, or a kernel that depends on the batch size",
    )


def _check_share(name: str, shares: dict[str, float]) -> Finding:
    share, step = shares["step_share"], int(shares["heaviest_step"])
    what, detail = f"steps of '{name}'", f"step {step} carries {share:.0%} of the gradient, more than any other"
    if share <= CLEARLY_OVER_HALF:
        return green(what, detail)
    return red(what, detail + ": it rules what is learned", REMEDY)


def _check_term(
    trainer: Trainer, term: Term, batch: Batch, reached: dict[str, float], shares: dict[str, float]
) -> Finding:
    """The term's gradient; `reached` collects each parameter's largest one, `shares` what its heaviest step carries."""
    what, note = f"objective '{term.name}'", ""
    if isinstance(batch, RewardedBatch) and len(batch) > 1 and batch.advantages.max() == batch.advantages.min():
        # Equal rewards (reported above) would hide whether gradients flow at all.
        advantages = torch.where(torch.arange(len(batch)) % 2 == 0, 1.0, -1.0).to(batch.advantages)
        batch, note = replace(batch, advantages=advantages, rewards=advantages), " (for made-up rewards)"
    seen = batch if term.view is None else term.view(batch)
    if not len(seen):
        return green(what, "no row of this draw is left to learn from")
    parameters = trainer.policy.parameters(term.trains)
    trainer.policy.draw = Draw(trainer.seed, term.name, 0, t_range=term.t)
    loss, steps = 0.0, dict[int, float]()
    for part, share in term.objective.split(seen):
        with trainer.accelerator.autocast():
            value, _ = term.objective.loss(trainer.policy, part)
        loss += share * float(value.detach())
        gradients = torch.autograd.grad(value * share, list(parameters.values()), allow_unused=True)
        step = term.objective.step_of(part)
        if step is not None:
            given = {str(index): value for index, value in enumerate(gradients) if value is not None}
            steps[step] = steps.get(step, 0.0) + float(norm(given))
        for name, gradient in zip(parameters, gradients, strict=True):
            size = 0.0 if gradient is None else float(gradient.abs().max())
            reached[name] = size if size != size else max(reached.get(name, 0.0), size)
    shares |= largest_share(steps)
    values: list[Any] = [reached[name] for name in parameters]
    if not all(value < float("inf") for value in [abs(loss), *values]):
        return red(what, f"loss {loss:.4g}, and a gradient that is not finite", "lower its weight or use float32")
    if max(values) == 0:
        return red(what, f"loss {loss:.4g}, but no gradient at all", "check `trains`, and the objective's options")
    return green(what, f"loss {loss:.4g}, with gradients{note}")


def _check_reached(trainer: Trainer, reached: dict[str, float]) -> Iterator[Finding]:
    for adapter in trainer.policy.adapters:
        if adapter not in trainer.trained:
            yield green(f"adapter '{adapter}' is frozen", "no term trains it; it stays as loaded by `start_from`")
            continue
        names = list(trainer.policy.parameters([adapter]))
        without = [name for name in names if not reached.get(name)]
        what = f"adapter '{adapter}' learns"
        if without:
            yield red(
                what,
                f"no gradient reaches {len(without)} of its {len(names)} tensors: {', '.join(without[:3])}",
                "nothing trains them: use `banks: 1` where no objective has negatives, or see `trains` and the weights",
            )
        else:
            yield green(what, f"gradients reach all of its {len(names)} tensors")

"""From a recipe to a trainer that is ready to run: data opened, backbone loaded, adapters attached, nothing written."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from accelerate import Accelerator

from agsm_rl.errors import UserError
from agsm_rl.export.attach import start_from
from agsm_rl.interfaces import Backbone
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.resolve import Parts, source_of
from agsm_rl.recipe.schema import Block
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.anomalies import AnomalyWatch
from agsm_rl.training.processes import make_accelerator


def build_trainer(
    recipe: Recipe,
    *,
    where: str = "recipe",
    allow_imports: Collection[str] = (),
    accelerator: Accelerator | None = None,
    fresh: bool = True,
) -> Trainer:
    """The recipe's trainer; UserError when data, weights or a combination of them cannot be used.

    fresh: begin with the adapters of `start_from`, where the recipe has one; a continued run has its own already.
    """
    accelerator = accelerator or make_accelerator()
    parts = Parts(where=where, allow_imports=allow_imports)
    terms = build_terms(recipe, parts)
    backbone = build_backbone(recipe.backbone, parts=parts, device=str(accelerator.device))
    adapters = {
        name: parts.construct("adapters", block, f"adapters.{name}", seed=recipe.seed)
        for name, block in recipe.adapters.items()
    }
    policy = _located(where, lambda: Policy(backbone, adapters, ema_decay=recipe.ema.decay))
    if fresh and (start := recipe.start_from) is not None:
        _located(f"{where}: start_from", lambda: _begin(policy, start, trained=recipe.trained))
    optimizer = recipe.optimizer
    trainer: Trainer = _located(
        where,
        lambda: Trainer(
            policy,
            terms,
            steps=recipe.steps,
            seed=recipe.seed,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            betas=optimizer.betas,
            max_grad_norm=optimizer.max_grad_norm,
            combine=recipe.combine,
            accelerator=accelerator,
            watch=AnomalyWatch(**recipe.watch.model_dump(exclude={"held_out_falls"})),
        ),
    )
    return trainer


def _begin(policy: Policy, start: str, *, trained: list[str]) -> None:
    """With the adapters of `start_from`; one that it lacks must be trained."""
    continued = start_from(policy.adapters, start)
    for name in policy.adapters:
        if name not in continued and name not in trained:
            raise UserError(
                f"{start} has no adapter '{name}', so it begins new, and no term trains it; name it in a term's "
                "`trains`, or take it out"
            )
    policy.restart_ema()


def build_terms(recipe: Recipe, parts: Parts) -> list[Term]:
    """The recipe's terms; those that name one source share one object, so that a batch is drawn once."""
    shared = {
        name: parts.construct("sources", block, f"sources.{name}", seed=recipe.seed)
        for name, block in recipe.sources.items()
    }
    terms = []
    for index, block in enumerate(recipe.objectives):
        place = f"objectives[{index}]"
        source = (
            shared[block.source]
            if isinstance(block.source, str)
            else parts.construct("sources", *source_of(recipe, index), seed=recipe.seed)
        )
        view = None
        if block.view is not None:
            view = parts.construct("views", block.view, f"{place}.view", seed=recipe.seed)
        terms.append(
            Term(
                parts.construct("objectives", block, place, seed=recipe.seed),
                source,
                name=block.name or block.use,
                weight=block.weight,
                every=block.every,
                offset=block.offset,
                t=block.t,
                trains=block.trains,
                source_name=block.source if isinstance(block.source, str) else None,
                view=view,
            )
        )
    return terms


def build_backbone(block: Block, *, parts: Parts, device: str | None = None) -> Backbone:
    """The backbone of a completed block, on `device` unless the block says another."""
    if "device" in block.options and block.options["device"] is None:
        block = Block.model_validate({"use": block.use, **block.options, "device": device})
    backbone: Backbone = parts.construct("backbones", block, "backbone", seed=0)
    return backbone


def _located(where: str, make: Any) -> Any:
    """Messages of deeper modules begin with the recipe's file."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error

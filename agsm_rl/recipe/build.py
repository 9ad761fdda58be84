"""From a recipe to a trainer that is ready to run: data opened, backbone loaded, adapters attached, nothing written."""

from __future__ import annotations

from accelerate import Accelerator

from agsm_rl.errors import UserError
from agsm_rl.export.attach import start_from
from agsm_rl.interfaces import Backbone
from agsm_rl.policy import Policy
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.places import check_places, located
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block
from agsm_rl.recipe.teachers import add_teachers
from agsm_rl.term import Term
from agsm_rl.trainer import Trainer
from agsm_rl.training.anomalies import AnomalyWatch
from agsm_rl.training.balance import GradientBalance
from agsm_rl.training.gradient_map import GradientMap
from agsm_rl.training.processes import make_accelerator
from agsm_rl.training.stages import stage


def build_trainer(recipe: Recipe, *, accelerator: Accelerator | None = None, fresh: bool = True) -> Trainer:
    """The recipe's trainer; UserError when data, weights or a combination of them cannot be used.

    fresh: begin with the adapters of `start_from`, where the recipe has one; a resumed run has its own already.
    """
    check_places(recipe, fresh=fresh)
    accelerator = accelerator or make_accelerator()
    parts, optimizer, looks = recipe.parts, recipe.optimizer, recipe.gradient_map
    terms = build_terms(recipe)
    backbone = build_backbone(recipe.backbone, parts=parts, device=str(accelerator.device))
    adapters = parts.adapters(recipe)
    with located(parts.where):
        ema = recipe.ema
        policy = Policy(backbone, adapters, ema_decay=ema.decay, ema_warm_up=ema.warm_up, ema_every=ema.every)
    add_teachers(policy, recipe, terms)
    if fresh and recipe.start_from is not None:
        with located(parts.at("start_from")):
            continued = _begin(policy, recipe.start_from, trained=recipe.trained)
        if recipe.reference == "start_from":
            policy.keep_reference(continued)  # a resumed run has it in its checkpoint
    with located(parts.where), stage("opening the data"):
        return Trainer(
            policy,
            terms,
            steps=recipe.steps,
            seed=recipe.seed,
            learning_rate=optimizer.learning_rate,
            optimizer={"use": optimizer.use, **optimizer.options},
            schedule={"use": optimizer.schedule.use, **optimizer.schedule.options},
            weight_decay=optimizer.weight_decay,
            betas=optimizer.betas,
            max_grad_norm=optimizer.max_grad_norm,
            combine=recipe.combine,
            balance=GradientBalance(recipe.weights.decay) if recipe.weights.balance else None,
            accelerator=accelerator,
            gradient_map=None if looks.every is None else GradientMap(looks.every, looks.levels),
            watch=AnomalyWatch(**recipe.watch.model_dump(exclude={"held_out_falls"})),
        )


def _begin(policy: Policy, start: str, *, trained: list[str]) -> list[str]:
    """With the adapters of `start_from`, whose names are returned; one that it lacks must be trained."""
    continued = start_from(policy.adapters, start)
    for name in policy.adapters:
        if name not in continued and name not in trained:
            raise UserError(
                f"{start} has no adapter '{name}', so it begins new, and no term trains it; name it in a term's "
                "`trains`, or take it out"
            )
    policy.restart_ema()
    return continued


def build_terms(recipe: Recipe) -> list[Term]:
    """The recipe's terms; those that name the same source share one object, so that a batch is drawn once."""
    return [
        Term(
            objective,
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
        for block, (objective, source, view) in zip(recipe.objectives, recipe.parts.terms(recipe), strict=True)
    ]


def build_backbone(block: Block, *, parts: Parts, device: str | None = None) -> Backbone:
    """The backbone of a completed block, on `device` unless the block says another."""
    if "device" in block.options and block.options["device"] is None:
        block = Block.model_validate({"use": block.use, **block.options, "device": device})
    name = block.options.get("checkpoint", block.use)
    with stage(f"loading {name}", announce=True):
        backbone: Backbone = parts.construct("backbones", block, "backbone", seed=0)
    return backbone

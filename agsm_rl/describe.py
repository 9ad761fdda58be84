"""What `agsm-rl check` prints: what would be trained, on what, and the memory that is known beforehand."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from agsm_rl.recipe import Block, Recipe
from agsm_rl.trainer import Trainer

NOT_COUNTED = (
    "not counted: activations (they grow with batch size and resolution; gradient_checkpointing lowers them), the "
    "batch itself (rollouts keep their whole path), reward models, and the framework's own working memory"
)


def describe(recipe: Recipe, trainer: Trainer) -> str:
    """A few lines about a recipe and the trainer built from it."""
    backbone, policy = trainer.policy.backbone, trainer.policy
    size_in_px = f"{backbone.resolution} x {backbone.resolution} px"
    checkpoint = recipe.backbone.options.get("checkpoint")
    lines = [f"backbone    {recipe.backbone.use}, {checkpoint}, {size_in_px}, {backbone.device}"]
    for name, block in recipe.adapters.items():
        found = policy.parameters([name]).values()
        lines.append(f"adapter     {name}: {block.use}, {count(found):,} parameters trained in {len(found)} tensors")
    if recipe.start_from is not None:
        lines.append(f"start       from the adapters of {recipe.start_from}")
    for term in recipe.objectives:
        source = f"source '{term.source}'" if not isinstance(term.source, Block) else _source(term.source)
        source += f" through {term.view.use}" if term.view else ""
        which = "all adapters" if term.trains is None else ", ".join(term.trains)
        weight = term.weight if isinstance(term.weight, dict) else f"{term.weight:g}"
        often = "each step" if term.every == 1 else f"each {term.every}th step"
        often += f" from step {term.offset}" if term.offset else ""
        lines.append(f"term        {term.name}: {term.use} on {source}, weight {weight}, {often}, trains {which}")
    for name, block in recipe.sources.items():
        lines.append(f"source      {name}: {_source(block)}")
    lines.append(f"steps       {recipe.steps}, combined by {recipe.combine}, seed {recipe.seed}")
    return "\n".join([*lines, *memory(trainer)])


def memory(trainer: Trainer) -> list[str]:
    """Bytes that are sure to be needed: weights, adapters, gradients, optimiser, EMA."""
    trained = list(trainer.policy.parameters().values())
    own = {id(tensor) for tensor in trained}
    modules = [part for part in trainer.policy.backbone.pipeline.components.values() if isinstance(part, nn.Module)]
    tensors = {id(t): t for part in modules for t in [*part.parameters(), *part.buffers()] if id(t) not in own}
    frozen, adapters = size(tensors.values()), size(trained)
    rows = {
        "frozen weights": frozen,
        "adapters": adapters,
        "gradients": adapters,
        "AdamW": 2 * adapters,
        "EMA": adapters,
    }
    parts = ", ".join(f"{name} {readable(value)}" for name, value in rows.items())
    return [f"memory      at least {readable(sum(rows.values()))}: {parts}", f"            {NOT_COUNTED}"]


def count(tensors: Iterable[Tensor]) -> int:
    """Numbers in the tensors."""
    return sum(tensor.numel() for tensor in tensors)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def readable(amount: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def _source(block: Block) -> str:
    options = block.options
    of = options.get("dataset") or options.get("prompts") or ""
    rewards = options.get("rewards")
    return f"{block.use} of {of}" + (f" with rewards {rewards}" if rewards else "")

"""The memory that a recipe's run will need, found by rehearsing its steps without numbers (rehearsal.py).

What is counted: weights, adapters, their gradients, AdamW's state and EMA, and at the peak of each phase of a run the
activations, batches and pictures on the device. What is not: NOT_COUNTED.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from agsm_rl.doctor.memory.meta_device import META, Rehearsal
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Batch, Cond, Metrics
from agsm_rl.policy import Policy
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block
from agsm_rl.trainer import Term, Trainer
from agsm_rl.training.sampling import guided

NOT_COUNTED = (
    "not counted: reward models, the framework's own memory (on a GPU some 0.5 GiB of CUDA context, its kernels' "
    "workspace and the allocator's gaps), autocast's copies"
)
STEPS_LOOKED_AT = 10_000
"""Of a run, to see which terms come together."""
NOTHING_DUE = "steps in which no term is due"
"""The phase of a run that learns and draws nothing."""
DRAWN_AT_ONCE = 50
"""Pictures of a sample grid that are drawn at once (drawing.draw)."""


@dataclass(frozen=True)
class Prediction:
    """Bytes: what lies there all the time, by name, and the peak of each phase of the run, what lies there included."""

    resident: dict[str, int]
    peaks: dict[str, int]

    @property
    def phase(self) -> str:
        """The phase with the largest peak."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def peak(self) -> int:
        """The largest of the peaks."""
        return self.peaks[self.phase]


def predict(recipe: Recipe) -> tuple[Trainer, Prediction | str]:
    """The recipe's trainer and the memory that the run will need, or why that cannot be told.

    The trainer has shapes alone: its weights are on the meta device, and damage within the weights' files is not seen.
    UserError as by `build_trainer`. A backbone without a `device` is loaded as it is, and nothing is predicted.
    """
    if "device" not in recipe.backbone.options:
        trainer = build_trainer(recipe)
        return trainer, f"backbone '{recipe.backbone.use}' takes no `device: meta`"
    with Rehearsal() as rehearsal:
        trainer = build_trainer(_for_rehearsal(recipe))
        resident = lie_there(trainer)
        try:
            _rehearse(trainer, recipe, rehearsal)
        except UserError:
            raise
        except Exception as error:  # whatever other people's parts make of tensors without numbers
            return trainer, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return trainer, Prediction(resident, rehearsal.peaks or {NOTHING_DUE: sum(resident.values())})


def _rehearse(trainer: Trainer, recipe: Recipe, rehearsal: Rehearsal) -> None:
    """The run's different steps and pictures, as they are after its first step."""
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    rehearsal.peaks = {}
    _lighten(trainer, rehearsal)
    for step in steps_to_see(trainer.terms, recipe.steps):
        trainer.step = step
        trainer.run_step()
    _rehearse_pictures(trainer.policy, recipe, rehearsal)


def lie_there(trainer: Trainer) -> dict[str, int]:
    """Bytes that are in use all the time: weights, adapters, gradients, optimiser, EMA."""
    own = {id(tensor): tensor for tensor in trainer.policy.parameters().values()}
    modules = [part for part in trainer.policy.backbone.pipeline.components.values() if isinstance(part, nn.Module)]
    frozen = {id(t): t for part in modules for t in [*part.parameters(), *part.buffers()] if id(t) not in own}
    adapters, trained = size_of(own.values()), size_of(trainer.parameters.values())
    return {
        "frozen weights": size_of(frozen.values()),
        "adapters": adapters,
        "gradients": trained,
        "AdamW": 2 * trained,
        "EMA": adapters,
    }


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def steps_to_see(terms: list[Term], steps: int) -> list[int]:
    """Steps (from 0) with different sets of terms that are due; none whose set is part of another's."""
    found: dict[frozenset[str], int] = {}
    for step in range(min(steps, STEPS_LOOKED_AT)):
        due = frozenset(term.name for term in terms if term.is_due(step))
        found.setdefault(due, step)
    return [step for due, step in found.items() if due and not any(due < other for other in found)]


def _for_rehearsal(recipe: Recipe) -> Recipe:
    """The recipe on the meta device, with no more data than a batch takes."""

    def changed(block: Block) -> Block:
        options = block.options
        for name in ("num_images", "num_pairs"):
            if name in options and options.get("batch_size"):
                options[name] = min(options[name] or options["batch_size"], options["batch_size"])
        own = {key: getattr(block, key) for key in type(block).model_fields}
        return type(block)(**own, **options)

    backbone = type(recipe.backbone)(use=recipe.backbone.use, **recipe.backbone.options | {"device": "meta"})
    objectives = [
        term if isinstance(term.source, str) else term.model_copy(update={"source": changed(term.source)})
        for term in recipe.objectives
    ]
    sources = {name: changed(block) for name, block in recipe.sources.items()}
    return recipe.model_copy(update={"backbone": backbone, "objectives": objectives, "sources": sources})


def _lighten(trainer: Trainer, rehearsal: Rehearsal) -> None:
    """What is the same again is not done again, and rewards are not asked: their models would be loaded."""
    _remember(trainer.policy.backbone, rehearsal)
    sources: dict[int, Any] = {}
    names = {id(source): name.removeprefix("sources.") for name, source in trainer.sources.items()}
    holders: list[Any] = [*trainer.sources.values(), *(term.objective for term in trainer.terms)]
    for holder in holders:
        if holder.rewards:
            holder.rewards = [replace(one, reward=_StandIn(one.reward)) for one in holder.rewards]
    for term in trainer.terms:
        key = id(term.source)
        if key not in sources:
            sources[key] = _Source(term.source, rehearsal, f"drawing {names[key]}")
        term.source = sources[key]
        learning: Any = _Objective(term.objective, rehearsal, f"learning {term.name}")
        term.objective = learning


def _remember(backbone: Backbone, rehearsal: Rehearsal) -> None:
    def banks() -> tuple[Any, ...]:
        return tuple(adapter.bank for adapter in backbone.adapters)

    def predicting(x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        return None if torch.is_grad_enabled() else (x_t.shape, x_t.dtype, cond.embeds.shape, banks())

    def coding(values: Tensor) -> Any:
        return None if torch.is_grad_enabled() and values.requires_grad else (values.shape, values.dtype)

    keys: dict[str, Any] = {"predict": predicting, "decode": coding, "encode_images": coding}
    for name, key in keys.items():
        setattr(backbone, name, rehearsal.remember(getattr(backbone, name), key))
    samplers: dict[int, _Sampler] = {}
    whole: Any = backbone
    make = whole.sampler

    def sampler(num_steps: int) -> _Sampler:
        if num_steps not in samplers:
            samplers[num_steps] = _Sampler(make(num_steps), rehearsal)
        return samplers[num_steps]

    whole.sampler = sampler


class _Sampler:
    """A sampler whose steps without gradients are done once."""

    def __init__(self, sampler: Any, rehearsal: Rehearsal) -> None:
        self.t = sampler.t
        self.transition = rehearsal.remember(sampler.transition, self._key)

    def _key(self, k: int, x_t: Tensor, prediction: Tensor, *, eta: float) -> Any:
        if not x_t.is_meta or (torch.is_grad_enabled() and prediction.requires_grad):
            return None
        return (x_t.shape, x_t.dtype, eta)


class _StandIn:
    """In a reward's place: differentiable, and without a model."""

    elsewhere = False

    def __init__(self, reward: Any) -> None:
        self.name, self.range, self.differentiable = reward.name, reward.range, reward.differentiable

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.float().mean(dim=(1, 2, 3))


class _Source:
    """A source whose drawing is a phase."""

    def __init__(self, source: Any, rehearsal: Rehearsal, phase: str) -> None:
        self._source, self._rehearsal, self._phase = source, rehearsal, phase
        self.gives, self.metrics = source.gives, source.metrics

    def next(self, policy: Policy) -> Batch:
        self._rehearsal.phase = self._phase
        self._rehearsal.touch()
        batch: Batch = self._source.next(policy)
        return batch


class _Objective:
    """An objective whose learning is a phase, of which no more parts are done than there are different ones."""

    def __init__(self, objective: Any, rehearsal: Rehearsal, phase: str) -> None:
        self._objective, self._rehearsal, self._phase = objective, rehearsal, phase
        self.consumes, self.check = objective.consumes, objective.check

    def split(self, batch: Any) -> Iterator[tuple[Any, float]]:
        self._rehearsal.phase = self._phase
        self._rehearsal.touch()
        parts = self._objective.split(batch)
        done: list[int] = []
        for part, share in parts:
            if done.count(len(part)) < 2:  # from the second on, gradients are added up
                done.append(len(part))
                yield part, share

    def loss(self, policy: Policy, batch: Any) -> tuple[Tensor, Metrics]:
        found: tuple[Tensor, Metrics] = self._objective.loss(policy, batch)
        return found


def _rehearse_pictures(policy: Policy, recipe: Recipe, rehearsal: Rehearsal) -> None:
    """Sample grids and evaluations, as far as the run makes any."""
    wanted = {}
    if recipe.evaluate is not None:
        guidance = max(recipe.evaluate.guidance)
        wanted["evaluating"] = (min(recipe.evaluate.batch_size, recipe.evaluate.num_images), guidance)
    if recipe.sample.prompts is not None or recipe.evaluate is not None:
        wanted["drawing samples"] = (min(DRAWN_AT_ONCE, recipe.sample.num_images), recipe.sample.guidance)
    backbone = policy.backbone
    for phase, (count, guidance) in wanted.items():
        rehearsal.phase = phase
        with torch.no_grad():
            cond = backbone.encode_text([f"picture {index}" for index in range(count)])
            uncond = backbone.encode_text([""])
            x_t = torch.empty(count, *backbone.latent_shape, device=META)
            t = torch.empty(count, device=META)
            x_t = x_t - guided(backbone.predict, x_t, t, cond, uncond, guidance)
            backbone.decode(x_t)

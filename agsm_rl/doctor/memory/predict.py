"""The memory that a recipe's run will need, found by rehearsing its steps without data (meta_device.py).

Counted: weights, adapters, their gradients, the optimizer's state and the EMA, plus the activations, batches and images
on the device at the peak of each phase. Not counted: NOT_COUNTED.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from agsm_rl.doctor.memory.drawing import rehearse_drawing
from agsm_rl.doctor.memory.meta_device import META, Rehearsal
from agsm_rl.doctor.memory.passes import PassCounter, Passes
from agsm_rl.doctor.memory.waiting import let_wait, waiting_sizes
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Batch, Cond, Metrics
from agsm_rl.policy import Policy
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Block
from agsm_rl.term import Term
from agsm_rl.trainer import Trainer
from agsm_rl.training.sampling import DDIM, noises_of
from agsm_rl.training.sizes import Resolution

NOT_COUNTED = (
    "not counted: reward models, graphs that rollouts keep where there is room, the framework's own memory (on a GPU "
    "some 0.5 GiB of CUDA context, its kernels' workspace and the allocator's gaps), autocast's copies"
)
STEPS_LOOKED_AT = 10_000
"""Steps of a run that are searched for terms that are due together."""
PICTURES = {"evaluating": "evaluate.resolution", "drawing samples": "sample.resolution"}
"""The phases in which pictures are drawn, and the key of their size."""
NOTHING_DUE = "steps in which no term is due"
"""The phase name for a run that neither draws nor learns."""
DRAWN_AT_ONCE = 50
"""Images of a sample grid that are drawn at once (drawing.draw)."""


@dataclass(frozen=True)
class Prediction:
    """Bytes that are always in use, by name, each phase's peak, which includes them, and its passes."""

    resident: dict[str, int]
    peaks: dict[str, int]
    passes: dict[str, Passes] = field(default_factory=dict)
    """Passes through the denoiser of each draw, and of each term's step."""

    @property
    def phase(self) -> str:
        """The phase with the largest peak."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def peak(self) -> int:
        """The largest peak."""
        return self.peaks[self.phase]


def predict(recipe: Recipe) -> tuple[Trainer, Prediction | str]:
    """The recipe's trainer and the memory that the run will need, or the reason why it cannot be predicted.

    The trainer's weights are on the meta device, so damaged weight files go unnoticed. UserError as in `build_trainer`.
    A backbone without a `device` option is loaded normally, and nothing is predicted.
    """
    if "device" not in recipe.backbone.options:
        trainer = build_trainer(recipe)
        return trainer, f"backbone '{recipe.backbone.use}' takes no `device: meta`"
    with Rehearsal() as rehearsal:
        trainer = build_trainer(_for_rehearsal(recipe))
        resident = always_in_use(trainer)
        try:
            passes = _rehearse(trainer, recipe, rehearsal)
        except UserError:
            raise
        except Exception as error:  # third-party parts may fail in any way on tensors without data
            return trainer, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    peaks = rehearsal.peaks or {NOTHING_DUE: sum(resident.values())}
    return trainer, Prediction(resident, peaks, passes)


def _rehearse(trainer: Trainer, recipe: Recipe, rehearsal: Rehearsal) -> dict[str, Passes]:
    """Run each kind of step and image drawing once, with the state as after the first step; the steps' passes."""
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    if not trainer.optimizer_kind.runs_on_meta:
        trainer.optimizer = _IdleOptimizer(trainer)
    trainer.optimizer.step()
    rehearsal.peaks = {}
    counter, passes = PassCounter(), dict[str, Passes]()
    _skip_repeats(trainer, rehearsal, counter)
    for backbone in trainer.policy.backbones():
        let_wait(backbone, waiting_sizes(backbone), rehearsal)
    for step in steps_to_see(trainer.terms, recipe.steps):
        trainer.step = step
        trainer.run_step()
        passes |= counter.phases
        counter.phases = {}
    _rehearse_pictures(trainer.policy, recipe, rehearsal)
    return passes


def always_in_use(trainer: Trainer) -> dict[str, int]:
    """Bytes that are always in use: weights, adapters, gradients, optimiser, EMA; parts that wait elsewhere are not."""
    adapter_tensors = {id(tensor): tensor for tensor in trainer.policy.parameters().values()}
    base, *teachers = (_weights_here(backbone) for backbone in trainer.policy.backbones())
    frozen = {key: tensor for key, tensor in base.items() if key not in adapter_tensors}
    old_policies = sum(term.objective.old is not None for term in trainer.terms)
    reference = trainer.policy.reference_parameters.values()
    adapters, trained = size_of(adapter_tensors.values()), size_of(trainer.parameters.values())
    return {
        "frozen weights": size_of(frozen.values()),
        **({"teachers": sum(size_of(weights.values()) for weights in teachers)} if teachers else {}),
        "adapters": adapters,
        "gradients": trained,
        type(trainer.optimizer_kind).__name__: trainer.optimizer_kind.state_bytes(list(trainer.parameters.values())),
        "EMA": adapters,
        **({"old policies": adapters * old_policies} if old_policies else {}),
        **({"reference": size_of(reference)} if reference else {}),
    }


def _weights_here(backbone: Backbone) -> dict[int, Tensor]:
    """The weights and buffers of the parts that do not wait elsewhere, by their ids."""
    components, waiting = backbone.pipeline.components.items(), getattr(backbone, "waiting", ())
    modules = [part for name, part in components if isinstance(part, nn.Module) and name not in waiting]
    return {id(tensor): tensor for part in modules for tensor in (*part.parameters(), *part.buffers())}


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def steps_to_see(terms: list[Term], steps: int) -> list[int]:
    """Steps (from 0) with different sets of due terms, without those whose set is part of another's."""
    first_step: dict[frozenset[str], int] = {}
    for step in range(min(steps, STEPS_LOOKED_AT)):
        due = frozenset(term.name for term in terms if term.is_due(step))
        first_step.setdefault(due, step)
    return [step for due, step in first_step.items() if due and not any(due < larger for larger in first_step)]


def _for_rehearsal(recipe: Recipe) -> Recipe:
    """The recipe on the meta device, with no more data than one batch needs."""

    def changed(block: Block) -> Block:
        options = block.options
        for name in ("num_images", "num_pairs"):
            if name in options and options.get("batch_size"):
                options[name] = min(options[name] or options["batch_size"], options["batch_size"])
        settings = {key: getattr(block, key) for key in type(block).model_fields}
        return type(block)(**settings, **options)

    backbone = type(recipe.backbone)(use=recipe.backbone.use, **recipe.backbone.options | {"device": "meta"})
    objectives = [
        term if isinstance(term.source, str) else term.model_copy(update={"source": changed(term.source)})
        for term in recipe.objectives
    ]
    sources = {name: changed(block) for name, block in recipe.sources.items()}
    # A look of the gradient map needs no more than the step before it, and would read numbers.
    looks = type(recipe.gradient_map)()
    blocks = {"backbone": backbone, "objectives": objectives, "sources": sources, "gradient_map": looks}
    return recipe.model_copy(update=blocks)


def _skip_repeats(trainer: Trainer, rehearsal: Rehearsal, counter: PassCounter) -> None:
    """Run repeated work only once, and replace the rewards, whose models would otherwise be loaded."""
    for backbone in trainer.policy.backbones():
        _remember(backbone, rehearsal)
        counted: Any = backbone
        counted.predict = counter.counted(counted.predict, lambda: rehearsal.phase)
    sources: dict[int, Any] = {}
    names = {id(source): name.removeprefix("sources.") for name, source in trainer.sources.items()}
    holders: list[Any] = [*trainer.sources.values(), *(term.objective for term in trainer.terms)]
    for holder in holders:
        if holder.rewards:
            holder.rewards = [replace(entry, reward=_StandIn(entry.reward)) for entry in holder.rewards]
    for term in trainer.terms:
        key = id(term.source)
        if key not in sources:
            sources[key] = _Source(term.source, rehearsal, counter, f"drawing {names[key]}")
        term.source = sources[key]
        learning: Any = _Objective(term.objective, rehearsal, counter, f"learning {term.name}")
        term.objective = learning


def _remember(backbone: Backbone, rehearsal: Rehearsal) -> None:
    """Replace the backbone's methods, on this instance only, by ones that run once per set of shapes."""

    def banks() -> tuple[Any, ...]:
        return tuple(adapter.bank for adapter in backbone.adapters)

    def predicting(x_t: Tensor, t: Tensor, cond: Cond) -> Any:
        return None if torch.is_grad_enabled() else (x_t.shape, x_t.dtype, cond.embeds.shape, banks())

    def coding(values: Tensor, *, noise: Tensor | None = None) -> Any:
        learns = torch.is_grad_enabled() and values.requires_grad
        return None if learns else (values.shape, values.dtype, noise is None)

    keys: dict[str, Any] = {"predict": predicting, "decode": coding, "encode_images": coding}
    for name, key in keys.items():
        setattr(backbone, name, rehearsal.remember(getattr(backbone, name), key))
    samplers: dict[int, _Sampler] = {}
    patched: Any = backbone  # assigning to a method needs Any
    make_sampler = patched.sampler

    def sampler(num_steps: int) -> _Sampler:
        if num_steps not in samplers:
            samplers[num_steps] = _Sampler(make_sampler(num_steps), rehearsal)
        return samplers[num_steps]

    patched.sampler = sampler


class _IdleOptimizer(torch.optim.Optimizer):
    """Stands in for an optimizer whose step needs data: it holds as much memory, and steps nowhere."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.optimizer.param_groups, {})
        size = trainer.optimizer_kind.state_bytes(list(trainer.parameters.values()))
        self._held = torch.empty(size, dtype=torch.uint8, device=META)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


class _Sampler:
    """A sampler whose steps without gradients run once."""

    def __init__(self, sampler: Any, rehearsal: Rehearsal) -> None:
        self.t, self.noises = sampler.t, noises_of(sampler)
        self.transition = rehearsal.remember(sampler.transition, self._key)

    def _key(self, k: int, x_t: Tensor, prediction: Tensor, *, eta: float, noise: str = DDIM) -> Any:
        if not x_t.is_meta or (torch.is_grad_enabled() and prediction.requires_grad):
            return None
        return (x_t.shape, x_t.dtype, eta, noise)


class _StandIn:
    """Stands in for a reward: differentiable, and without a model."""

    elsewhere = False

    def __init__(self, reward: Any) -> None:
        self.name, self.range, self.differentiable = reward.name, reward.range, reward.differentiable

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.float().mean(dim=(1, 2, 3))


class _Source:
    """A source whose drawing counts as a phase."""

    def __init__(self, source: Any, rehearsal: Rehearsal, counter: PassCounter, phase: str) -> None:
        self._source, self._rehearsal, self._counter, self._phase = source, rehearsal, counter, phase
        self.gives, self.metrics, self.batch_size = source.gives, source.metrics, source.batch_size

    def next(self, policy: Policy) -> Batch:
        self._rehearsal.phase, self._counter.repeats = self._phase, 1.0
        self._rehearsal.touch()
        batch: Batch = self._source.next(policy)
        return batch


class _Objective:
    """An objective whose learning counts as a phase; parts of the same size run at most twice."""

    old = None

    def __init__(self, objective: Any, rehearsal: Rehearsal, counter: PassCounter, phase: str) -> None:
        self._objective, self._rehearsal, self._counter, self._phase = objective, rehearsal, counter, phase
        self.consumes, self.check = objective.consumes, objective.check
        self.takes_graph, self.detach_unconditional = objective.takes_graph, objective.detach_unconditional

    def split(self, batch: Any) -> Iterator[tuple[Any, float]]:
        self._rehearsal.phase = self._phase
        self._rehearsal.touch()
        parts = list(self._objective.split(batch))
        sizes = Counter(len(part) for part, _ in parts)
        done: Counter[int] = Counter()
        for part, share in parts:
            if done[len(part)] < 2:  # the second part adds to existing gradients
                done[len(part)] += 1
                self._counter.repeats = sizes[len(part)] / min(2, sizes[len(part)])
                yield part, share

    def step_of(self, part: Any) -> None:
        return None

    def loss(self, policy: Policy, batch: Any) -> tuple[Tensor, Metrics]:
        result: tuple[Tensor, Metrics] = self._objective.loss(policy, batch)
        return result


def _rehearse_pictures(policy: Policy, recipe: Recipe, rehearsal: Rehearsal) -> None:
    """Rehearse sample grids and evaluations, if the run has any."""
    phases: dict[str, tuple[int, float, Resolution | None]] = {}
    if recipe.evaluate is not None:
        guidance = max(recipe.evaluate.guidance)
        phases["evaluating"] = (recipe.evaluate.drawn_at_once, guidance, recipe.evaluate.resolution)
    if recipe.sample.prompts is not None or recipe.evaluate is not None:
        grid = recipe.sample
        phases["drawing samples"] = (min(DRAWN_AT_ONCE, grid.num_images), max(grid.guidance), grid.resolution)
    for phase, (count, guidance, resolution) in phases.items():
        rehearsal.phase = phase
        rehearse_drawing(policy.backbone, count, guidance, resolution, where=PICTURES[phase])

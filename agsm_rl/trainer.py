"""The step over the terms. Nothing about any particular objective is written here."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from agsm_rl.backbones.text_cache import text_cache_of
from agsm_rl.backbones.text_memory import TextMemory
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch
from agsm_rl.policy import Objective, Policy, Source
from agsm_rl.term import Term as Term
from agsm_rl.training.anomalies import AnomalyWatch
from agsm_rl.training.balance import GradientBalance
from agsm_rl.training.binding import bind_sources, check_prompts, encode_prompts
from agsm_rl.training.combine import Gradient, find_combiner
from agsm_rl.training.defaults import with_defaults
from agsm_rl.training.gradient_map import GradientMap, Learned
from agsm_rl.training.gradients import as_numbers, cosines, largest_share, norm
from agsm_rl.training.optimizers import OPTIMIZERS, NamedOptimizer, chosen, floating_state
from agsm_rl.training.precision import warn_if_slow
from agsm_rl.training.processes import Processes, make_accelerator
from agsm_rl.training.prompt_lengths import warn_of_cut_prompts
from agsm_rl.training.randomness import Draw
from agsm_rl.training.result import TrainingResult, step_bar
from agsm_rl.training.row_shares import RowShare, filled, share_of
from agsm_rl.training.schedules import LearningRates
from agsm_rl.training.stages import stage


class Callback:
    """What is called while a trainer runs: progress, trackers, checkpoints, evaluation. Does nothing by default."""

    def on_step(self, trainer: "Trainer", step: int, metrics: dict[str, float]) -> None:
        """Called after each step; `step` counts from 1."""

    def on_end(self, trainer: "Trainer") -> None:
        """Called after the last step."""


class Trainer:
    """Learns the policy's parameters from terms, by default with AdamW (published: weight decay 1e-4, betas 0.9/0.999).

    `learning_rate` is one number or one per trained adapter, {adapter: number}; None is the optimizer's own default
    (AdamW's: 1e-3, as published). `optimizer` and `schedule` are names, or {use: name, options…}, as in a recipe.
    Gradients are clipped to `max_grad_norm` (None: not). `balance` makes weights the lengths of the terms' gradients.
    `watch` says what is done about numbers that go wrong; `gradient_map` looks where the terms agree.
    """

    def __init__(
        self,
        policy: Policy,
        terms: Sequence[Term],
        *,
        steps: int,
        seed: int = 0,
        learning_rate: float | Mapping[str, float] | None = None,
        optimizer: str | Mapping[str, Any] = "adamw",
        schedule: str | Mapping[str, Any] = "constant",
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        max_grad_norm: float | None = 1.0,
        combine: str = "sum",
        balance: GradientBalance | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
        watch: AnomalyWatch | None = None,
        gradient_map: GradientMap | None = None,
    ) -> None:
        if not terms:
            raise UserError("objectives: the list is empty, so there is nothing to learn")
        self.policy, self.terms, self.steps, self.seed = policy, list(terms), steps, seed
        self.combine, self.max_grad_norm = find_combiner(combine), max_grad_norm
        self.accelerator = accelerator or make_accelerator()
        self.processes = Processes(self.accelerator)
        if self.accelerator.mixed_precision == "fp16":
            raise UserError("mixed precision 'fp16' is not supported: gradients are not scaled; use bf16, or no")
        if self.accelerator.mixed_precision == "bf16":
            warn_if_slow("mixed precision: bf16", torch.bfloat16, self.accelerator.device)
        self.callbacks = [with_defaults(callback, Callback) for callback in callbacks]
        self.watch, self.balance, self.gradient_map = watch or AnomalyWatch(), balance, gradient_map
        self.step, self.stopping = 0, False
        self.trained = [name for name in policy.adapters if any(name in (term.trains or [name]) for term in terms)]
        """Adapters that some term trains; the others are frozen, such as a LoRA that another run trained."""
        self.parameters = policy.parameters(self.trained)
        for name, parameter in policy.parameters().items():
            parameter.requires_grad_(name in self.parameters)
        kind: NamedOptimizer = chosen(OPTIMIZERS, optimizer, "optimizer")
        given = kind.default_rate if learning_rate is None else learning_rate
        self.rates = LearningRates(given, self.trained, schedule=schedule, steps=steps)
        self.optimizer = self.rates.make(kind, policy, weight_decay=weight_decay, betas=betas)
        self.optimizer_kind = kind
        for term in self.terms:
            if term.objective.old is not None:
                policy.keep_old(term.name)
        self.sources = bind_sources(self.terms, seed, policy.backbone, self.processes)
        self._unread = check_prompts(self.terms, self.sources, policy.backbone, self.processes)
        """Sources whose prompts are not known before they come."""
        self._texts = [TextMemory(backbone) for backbone in policy.backbones()]
        with self.accelerator.autocast():  # as in a step
            encode_prompts(self.sources, policy.backbone, self.processes)

    def train(self, *, progress: bool = True, history: bool = True) -> TrainingResult:
        """Run up to `steps`, or until a callback sets `stopping`; the result has the adapters and each step's metrics.

        progress: show a bar on a terminal or in a notebook. history: keep the metrics for the result.
        """
        kept: list[dict[str, float]] = []
        self._agree_to_stop()
        with step_bar(self.steps, done=self.step, shown=progress and self.processes.index == 0) as advance:
            while self.step < self.steps and not (self.stopping and self.can_pause):
                started = time.perf_counter()
                metrics = self.run_step()
                metrics["seconds"] = time.perf_counter() - started
                for callback in self.callbacks:
                    callback.on_step(self, self.step, metrics)
                advance(self.step, metrics)
                if history:
                    kept.append({"step": self.step, **metrics})
                self._agree_to_stop()
        for callback in self.callbacks:
            callback.on_end(self)
        return TrainingResult(self.step, self.policy.adapters, kept)

    @property
    def can_pause(self) -> bool:
        """Whether a checkpoint of this step, which one process writes, holds all that every process needs to go on."""
        return self.processes.count == 1 or not any(source.unlearned() for source in self.sources.values())

    def _agree_to_stop(self) -> None:
        """If one process has to stop, all stop after the same step."""
        if self.processes.count > 1:
            self.stopping = bool(self.processes.numbers(float(self.stopping)).any())

    def run_step(self) -> dict[str, float]:
        """One optimiser step over the terms that are due; returns the step's metrics."""
        with ExitStack() as stack:
            for texts in self._texts:
                stack.enter_context(texts.in_use())
            return self._run_step()

    def _run_step(self) -> dict[str, float]:
        batches: dict[int, Batch] = {}
        gradients: dict[str, Gradient] = {}
        metrics: dict[str, float] = {"loss": 0.0}
        self.watch.begin_step()
        learned: list[Learned] = []
        for term in self.terms:
            if not term.is_due(self.step):
                continue
            weight = term.weight_at(self.step)
            if id(term.source) not in batches:
                self.policy.acting_for = self._drawn_for(term.source)
                self.policy.graph_for = self._takes_graph(term.source)
                # As the losses are computed: log-probabilities are compared across the two.
                with self.accelerator.autocast():
                    batches[id(term.source)] = term.source.next(self.policy)
                self._look_at_prompts(term, batches[id(term.source)])
            batch = batches[id(term.source)]
            share = RowShare(len(batch))
            if term.view is not None:
                batch = term.view(batch)
                share = share_of(len(batch), self.processes)
                metrics[f"{term.name}/rows"] = float(share.total)
            gradient: Gradient | None = None
            figures: dict[str, float] = {}
            if share.total:
                with stage(f"{term.name}: learning"):
                    gradient, figures = self._learn(term, batch, share)
            figures |= term.source.metrics()
            metrics |= {f"{term.name}/{key}": value for key, value in figures.items()}
            passes = self.watch.term_passes(self.step + 1, term.name, figures)
            if gradient is None:
                continue
            if not passes:
                # Its source has advanced as usual, but its gradient is not applied.
                metrics[f"{term.name}/skipped"] = 1.0
                continue
            learned.append(Learned(term, batch, share))
            metrics["loss"] += weight * figures["loss"]
            if self.balance is not None:
                metrics[f"{term.name}/balance"] = self.balance.factor(term.name, figures["grad_norm"])
                weight *= metrics[f"{term.name}/balance"]
            gradients[term.name] = {name: weight * value for name, value in gradient.items()}
        metrics |= cosines(gradients)
        combined = self.combine(list(gradients.values()), self.seed + self.step)
        self._look_at_adapters([item.term for item in learned], combined)
        if self.gradient_map is not None:
            self.gradient_map.look(self, learned)
        self.rates.set(self.optimizer, self.step)
        self._apply(combined, metrics)
        for term in self.terms:
            old = term.objective.old
            if old and term.is_due(self.step) and old.is_due(term.turn(self.step), unlearned=term.source.unlearned()):
                self.policy.update_old(term.name, old.decay_at(self.step))
        metrics |= self.rates.metrics(self.optimizer)
        self.step += 1
        for cache in map(text_cache_of, self.policy.backbones()):
            if cache is not None:
                cache.end_step()
        return metrics

    def _drawn_for(self, source: Source) -> str | None:
        """The term whose old policy draws: of those that have one, the first that learns now, else the first."""
        owners = [term for term in self.terms if term.source is source and term.objective.old]
        learning = [term for term in owners if term.is_due(self.step)]
        return next((term.name for term in [*learning, *owners]), None)

    def _takes_graph(self, source: Source) -> Objective | None:
        """The first objective that is due and learns from the graph of the whole of a draw, if there is one."""
        rows = (source.batch_size or 0) // self.processes.count
        due = (term for term in self.terms if term.source is source and term.is_due(self.step))
        whole = (term.objective for term in due if term.view is None)
        return next((objective for objective in whole if objective.takes_graph(rows)), None)

    def _look_at_prompts(self, term: Term, batch: Batch) -> None:
        if id(term.source) in self._unread:
            self._unread.discard(id(term.source))
            if self.processes.index == 0:
                warn_of_cut_prompts(batch.prompts, self.policy.backbone, name=term.name, first_batch=True)

    def _learn(self, term: Term, batch: Batch, mine: RowShare) -> tuple[Gradient, dict[str, float]]:
        """The term's gradient (before its weight) and its figures, averaged over the rows of all processes."""
        parameters = self.policy.parameters(term.trains)
        self.policy.draw = Draw(self.seed, term.name, self.step, t_range=term.t)
        self.policy.acting_for = term.name
        total: Gradient = {}
        sums: dict[str, Tensor] = {}
        steps: dict[int, Tensor] = {}
        for part, share in term.objective.split(batch) if len(batch) else ():
            share *= mine.weight
            with self.accelerator.autocast():
                loss, figures = term.objective.loss(self.policy, part)
            found = torch.autograd.grad(loss * share, list(parameters.values()), allow_unused=True)
            given = {name: value for name, value in zip(parameters, found, strict=True) if value is not None}
            step = term.objective.step_of(part)
            if step is not None:
                steps[step] = steps.get(step, 0) + norm(given)
            for name, value in given.items():
                total[name] = total[name] + value if name in total else value
            for key, figure in ({"loss": loss.detach()} | figures).items():
                sums[key] = sums.get(key, 0) + figure.detach().float() * share
        if mine.is_filled:
            total = filled(total, self.processes.names(total), lambda name: parameters[name].detach())
            sums = filled(sums, self.processes.names(sums))
            steps = filled(steps, map(int, self.processes.names(map(str, steps))))
        total = dict(zip(total, self.processes.mean(list(total.values())), strict=True))
        means = self.processes.mean([*sums.values(), *steps.values()])
        numbers = as_numbers([*means, norm(total)])
        lengths = dict(zip(steps, numbers[len(sums) :], strict=False))
        return total, dict(zip(sums, numbers, strict=False)) | {"grad_norm": numbers[-1]} | largest_share(lengths)

    def _look_at_adapters(self, learned: list[Term], gradient: Gradient) -> None:
        """Report to the watch which of the adapters that this step trains got a gradient that is not all 0."""
        trained = {name for term in learned for name in (term.trains or self.policy.adapters)}
        counts: dict[str, Tensor] = {}
        for adapter in sorted(trained):
            values = [gradient[name] for name in self.policy.parameters([adapter]) if name in gradient]
            counts[adapter] = sum((value.count_nonzero() for value in values), torch.zeros(()))
        reached = {name: count > 0 for name, count in zip(counts, as_numbers([*counts.values()]), strict=True)}
        self.watch.look_at_adapters(self.step + 1, reached)

    def _apply(self, gradient: Gradient, metrics: dict[str, float]) -> None:
        if not gradient:
            return
        metrics["grad_norm"] = float(norm(gradient))
        if not self.watch.step_passes(self.step + 1, metrics["grad_norm"]):
            metrics["skipped"] = 1.0
            return
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in gradient.items():
            self.parameters[name].grad = value
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.optimizer.step()
        self.policy.update_ema(self.step + 1)
        self.check_finite(self.step + 1)

    def check_finite(self, step: int | None = None) -> None:
        """WentWrong when a parameter, its EMA or its optimiser state is not finite: such a state must not be kept."""
        tensors = self._state_tensors()
        if not torch.isfinite(torch.nn.utils.get_total_norm(list(tensors.values()), norm_type=torch.inf)):
            wrong = next(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
            self.watch.state_went_wrong(self.step if step is None else step, wrong)

    def _state_tensors(self) -> dict[str, Tensor]:
        """What the optimiser's step changes, by names for messages."""
        tensors: dict[str, Tensor] = dict(self.policy.tensors())
        for name, parameter in self.parameters.items():
            for key, value in floating_state(self.optimizer, parameter).items():
                tensors[f"the optimiser's {key} of '{name}'"] = value
        return tensors

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs; tensors and plain values only."""
        balance = {} if self.balance is None else {"balance": self.balance.state_dict()}
        return balance | {
            "step": self.step,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "parameters": list(self.parameters),
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; UserError if it belongs to another run."""
        if set(state["sources"]) != set(self.sources):
            got, wanted = ", ".join(sorted(state["sources"])), ", ".join(sorted(self.sources))
            raise UserError(f"checkpoint: its sources are {got}, but this recipe's are {wanted}; use the run's recipe")
        self.policy.load_state_dict(state["policy"])
        if state["parameters"] != list(self.parameters):
            raise UserError(
                "checkpoint: its adapters are in a different order from the recipe's, which the optimiser's state "
                "depends on; use the run's recipe"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        for name, tensor in self._state_tensors().items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"checkpoint: {name} is not finite; delete that checkpoint to resume from an older one")
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        if "watch" in state:  # checkpoints of earlier versions have none
            self.watch.load_state_dict(state["watch"])
        if self.balance is not None and "balance" in state:
            self.balance.load_state_dict(state["balance"])
        self.step = int(state["step"])

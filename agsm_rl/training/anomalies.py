"""Numbers that go wrong in a run: found, named (term, step, value), and handled as the recipe's `watch:` says.

All figures looked at are already the same in all processes, so that all of them decide alike.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal, NoReturn

from agsm_rl.errors import UserError

Action = Literal["warn", "skip", "stop", "ignore"]

HALF = 0.5
"""Share of a term's gradient above which one denoising step rules it."""
HEAVY_IN_A_ROW = 3
"""Steps in a row in which that must be so, because the share of one batch varies by a few percent."""
REMEDY = (
    "leave it out with a smaller `timestep_fraction`, put the noise elsewhere with the rollouts' `sde_window`, draw "
    "with another `noise` or more steps, or accept it: `watch: {step_share: ignore}`"
)


@dataclass(frozen=True)
class Event:
    """Something that went wrong: which watch saw it, in which step, of what (a term, an adapter, a reward)."""

    step: int
    watch: str
    subject: str
    value: float
    action: str
    message: str

    def to_json(self) -> dict[str, Any]:
        """For events.jsonl; JSON has no NaN, so such a value becomes text."""
        return asdict(self) | {"value": self.value if isfinite(self.value) else str(self.value)}


class WentWrong(UserError):
    """The end of a run by a watch; `event` says why."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.message)
        self.event = event


class AnomalyWatch:
    """Looks at each term's figures and at each adapter's gradient (the options are those of recipe.Watch).

    Warnings are given when something begins, not again while it lasts. `events` are those of the newest step.
    """

    def __init__(
        self,
        *,
        non_finite: Literal["stop", "skip"] = "stop",
        non_finite_skips: int = 10,
        x0_norm: Action = "warn",
        x0_norm_factor: float = 4.0,
        zero_variance: Action = "warn",
        constant_reward: Action = "warn",
        zero_gradient: Literal["warn", "stop", "ignore"] = "warn",
        zero_gradient_steps: int = 10,
        step_share: Literal["warn", "stop", "ignore"] = "warn",
    ) -> None:
        self.actions: dict[str, str] = {
            "non_finite": non_finite,
            "x0_norm": x0_norm,
            "zero_variance": zero_variance,
            "constant_reward": constant_reward,
            "zero_gradient": zero_gradient,
            "step_share": step_share,
        }
        self.non_finite_skips, self.x0_norm_factor = non_finite_skips, x0_norm_factor
        self.zero_gradient_steps = zero_gradient_steps
        self.events: list[Event] = []
        self._skipped: dict[str, int] = {}
        self._first_x0: dict[str, float] = {}
        self._zero_steps: dict[str, int] = {}
        self._heavy_steps: dict[str, int] = {}
        self._lasting: set[str] = set()

    def begin_step(self) -> None:
        """Forget the events of the step before."""
        self.events = []

    def term_passes(self, step: int, term: str, figures: Mapping[str, float]) -> bool:
        """Whether the term may be learned from in this step; WentWrong when the run must end.

        figures: the term's loss and gradient norm, and its source's figures of the newest batch.
        """
        passes = self._finite(step, f"objective '{term}'", term, figures)
        if "x0_norm" in figures:
            size, first = figures["x0_norm"], self._first_x0.setdefault(term, figures["x0_norm"])
            words = (
                f"the images drawn grow without bound: their largest latents have a root mean square of {size:.3g}, in "
                f"the first draw it was {first:.3g}; lower optimizer.learning_rate, or stop earlier"
            )
            passes &= self._judge("x0_norm", step, term, size, size > self.x0_norm_factor * first, words)
        spreads = {key.removeprefix("reward_std/"): figures[key] for key in figures if key.startswith("reward_std/")}
        for name, spread in spreads.items():
            value = figures.get(f"reward/{name}", 0.0)
            words = f"reward '{name}' is {value:g} for all images of a draw; does it look at them?"
            passes &= self._judge("constant_reward", step, term, value, spread == 0, words, detail=name)
        # Where each reward is constant, the warnings above have said more than this one would.
        told = bool(spreads) and not any(spreads.values()) and self.actions["constant_reward"] != "ignore"
        if "zero_variance" in figures and not (told and self.actions["zero_variance"] == "warn"):
            words = "the images of a draw are all worth the same, so there is nothing to learn from; draw more of them"
            passes &= self._judge("zero_variance", step, term, 0.0, figures["zero_variance"] > 0, words)
        if "step_share" in figures:
            self._look_at_share(step, term, figures["step_share"], int(figures["heaviest_step"]))
        return passes

    def _look_at_share(self, step: int, term: str, share: float, heaviest: int) -> None:
        heavy = self._heavy_steps.get(term, 0) + 1 if share > HALF else 0
        self._heavy_steps[term] = heavy
        words = (
            f"denoising step {heaviest} (the first is 0) carried {share:.0%} of its gradient, so the others hardly "
            f"count; {REMEDY}"
        )
        # It lasts once it has begun: a share that hovers around the half is reported once.
        if heavy >= HEAVY_IN_A_ROW:
            self._judge("step_share", step, term, share, True, words)

    def step_passes(self, step: int, grad_norm: float) -> bool:
        """Whether the terms' gradients made one may be applied."""
        return self._finite(step, "the combined gradient", "combine", {"grad_norm": grad_norm})

    def state_went_wrong(self, step: int, what: str) -> NoReturn:
        """End the run: what the step has made is not finite, and there is no way back from that."""
        words = (
            f"step {step}: {what} is not finite after the optimiser's step, so nothing of this step is kept. Start a "
            "new run with a lower optimizer.learning_rate (with `start_from: <this run>` it begins with what this one "
            "exported last)"
        )
        raise WentWrong(Event(step, "non_finite", what, float("nan"), "stop", words))

    def look_at_adapters(self, step: int, reached: Mapping[str, bool]) -> None:
        """Check whether the gradient of each adapter that this step trains differs from exactly 0."""
        for adapter, moved in reached.items():
            self._zero_steps[adapter] = count = 0 if moved else self._zero_steps.get(adapter, 0) + 1
            words = (
                f"its gradient was exactly 0 for {count} steps in a row, so it learns nothing; is it on the path of "
                f"what the terms look at?"
            )
            wrong = count >= self.zero_gradient_steps
            self._judge("zero_gradient", step, f"adapter '{adapter}'", float(count), wrong, words)

    def _finite(self, step: int, who: str, subject: str, figures: Mapping[str, float]) -> bool:
        for what in ("loss", "grad_norm"):
            value = figures.get(what, 0.0)
            if isfinite(value):
                continue
            self._skipped[subject] = count = self._skipped.get(subject, 0) + 1
            words = f"step {step}: {who}: its {what} is {value}; nothing was changed by "
            if self.actions["non_finite"] == "stop" or count > self.non_finite_skips:
                often = f" (after {count - 1} skipped steps in a row)" if count > 1 else ""
                words += f"this step{often}. Begin a new run with a lower optimizer.learning_rate (with `start_from: "
                words += "<this run>` it continues from this one's last export), or leave such steps out: --resume "
                words += "--set watch.non_finite=skip"
                raise WentWrong(Event(step, "non_finite", subject, value, "stop", words))
            self.events.append(Event(step, "non_finite", subject, value, "skip", words + "it, it was left out"))
            return False
        self._skipped.pop(subject, None)
        return True

    def _judge(
        self, watch: str, step: int, subject: str, value: float, wrong: bool, words: str, *, detail: str = ""
    ) -> bool:
        """False where the term is to be skipped; `detail` distinguishes several things about one subject."""
        action, key = self.actions[watch], f"{watch}/{subject}/{detail}"
        if not wrong or action == "ignore":
            self._lasting.discard(key)
            return True
        event = Event(step, watch, subject, value, action, f"step {step}: {subject}: {words}")
        if action == "stop":
            raise WentWrong(event)
        if action == "skip" or key not in self._lasting:
            self.events.append(event)
        self._lasting.add(key)
        return action != "skip"

    def state_dict(self) -> dict[str, Any]:
        """What the run has seen so far; plain values only."""
        return {
            "skipped": dict(self._skipped),
            "first_x0": dict(self._first_x0),
            "zero_steps": dict(self._zero_steps),
            "lasting": sorted(self._lasting),
            "heavy_steps": dict(self._heavy_steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._skipped, self._first_x0 = dict(state["skipped"]), dict(state["first_x0"])
        self._zero_steps, self._lasting = dict(state["zero_steps"]), set(state["lasting"])
        self._heavy_steps = dict(state.get("heavy_steps", {}))  # checkpoints of earlier versions have none

"""What DDPO, Flow-GRPO and its kin share: denoising steps are actions, drawn from Gaussians whose means are learned.

PPO's clipped loss on log-probabilities, the distribution of a rollout's steps under any of a policy's predictions, and
the split of a batch by steps. Nothing here asks which backbone's sampler made the steps.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.interfaces import Batch, Cond, Metrics, RolloutBatch
from agsm_rl.objectives.passes import check_at_least_one, in_passes
from agsm_rl.policy import Objective, Policy, Source
from agsm_rl.training.guidance import guiding
from agsm_rl.training.kept_graph import KeptGraph
from agsm_rl.training.precision import at_least_float32
from agsm_rl.training.sampling import Predict, log_density, step_distributions
from agsm_rl.training.sizes import sampler_for


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_range: float = 1e-4
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss (arXiv 1707.06347, eq. 7), as DDPO uses it.

    All of one shape, or broadcasting to that of `log_prob`; gradient through `log_prob` alone. `clip_range` > 0; it is
    tiny (published: 1e-4) because log-probabilities are means over latent elements.

    Metrics: `ratio` (mean), `ratio_deviation` (mean |ρ - 1|), `clip_fraction`, `approximate_kl` = mean ½(log ρ)².
    """
    if torch.broadcast_shapes(log_prob.shape, old_log_prob.shape, advantages.shape) != log_prob.shape:
        shapes = ", ".join(str(tuple(one.shape)) for one in (log_prob, old_log_prob, advantages))
        raise ValueError(f"log_prob, old_log_prob, advantages: their shapes {shapes} must broadcast to the first one's")
    difference = at_least_float32(log_prob) - at_least_float32(old_log_prob.detach())
    losses, metrics = clipped_losses(difference, advantages, clip_range=clip_range)
    return losses.mean(), metrics


def clipped_losses(log_ratio: Tensor, advantages: Tensor, *, clip_range: float) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss of each step, before the mean, of log ρ; advantages broadcast to its shape.

    Metrics as of `clipped_policy_loss`.
    """
    ratio, advantages = log_ratio.exp(), at_least_float32(advantages.detach())
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    off = (ratio.detach() - 1).abs()
    return losses, {
        "ratio": ratio.detach().mean(),
        "ratio_deviation": off.mean(),
        "clip_fraction": (off > clip_range).float().mean(),
        "approximate_kl": 0.5 * (log_ratio.detach() ** 2).mean(),
    }


class PolicyGradient(Objective):
    """An objective over rollouts that learns from their steps in passes, with the guidance that they were drawn with.

    Args:
        clip_range: c > 0 of PPO's clipped loss: a step is not followed further once its ratio leaves 1 ± c.
        timestep_fraction: Share f of each image's steps in (0, 1] that is learned from.
        timesteps: Which steps these are. `first`: those among the first ⌊n·f⌋ of all n that have noise, as the authors
            of Flow-GRPO choose them; `even`: as many of the noisy ones, evenly spaced.
        images_per_pass: Images that go through the denoiser at once; null is all. Fewer need less memory and give the
            same gradient.
        steps_per_pass: Denoising steps of each image that go through the denoiser at once: the same gradient, faster on
            a GPU that few images leave idle.
    """

    consumes: ClassVar[type[Batch]] = RolloutBatch
    draws_t: ClassVar[bool] = False

    def __init__(
        self,
        *,
        clip_range: float = 1e-4,
        timestep_fraction: float = 1.0,
        timesteps: Literal["first", "even"] = "first",
        images_per_pass: int | None = None,
        steps_per_pass: int = 1,
    ) -> None:
        if clip_range <= 0:
            raise UserError(f"clip_range: got {clip_range}, but it must be above 0 (published: 1e-4)")
        if not 0 < timestep_fraction <= 1:
            raise UserError(f"timestep_fraction: got {timestep_fraction}, but it must lie in (0, 1]")
        check_at_least_one("images_per_pass", images_per_pass)
        check_at_least_one("steps_per_pass", steps_per_pass)
        self.clip_range = clip_range
        if timesteps not in ("first", "even"):
            raise unknown_name("timesteps", timesteps, "a choice of steps", ("first", "even"))
        self.timestep_fraction, self.timesteps, self.images_per_pass = timestep_fraction, timesteps, images_per_pass
        self.steps_per_pass = steps_per_pass
        self._texts = TextsOfPass()

    def split(self, batch: RolloutBatch) -> list[tuple[RolloutBatch, float]]:
        """One part per `steps_per_pass` denoising steps of `images_per_pass` images: a part's activations are held.

        If the rollouts kept their graph, the activations of all images are held already, and a backward pass frees
        them all: such images are not split.
        """
        if not batch.steps:
            raise UserError(
                f"none of the {batch.num_steps} sampling steps has noise; set the rollouts' num_steps to 2 or more"
            )
        graph = self._graph_of(batch)
        kept = graph is not None and graph.holds(batch.steps)
        learned = self._learned_steps(batch)
        passes = [learned[first : first + self.steps_per_pass] for first in range(0, len(learned), self.steps_per_pass)]
        return [
            (replace(part, steps=steps), share * len(steps) / len(learned))
            for part, share in in_passes(batch, None if kept else self.images_per_pass)
            for steps in passes
        ]

    def _learned_steps(self, batch: RolloutBatch) -> tuple[int, ...]:
        """One of the noisy steps at least."""
        if self.timesteps == "first":
            end = int(batch.num_steps * self.timestep_fraction + 1e-9)
            return tuple(k for k in batch.steps if k < end) or batch.steps[:1]
        count = max(1, round(self.timestep_fraction * len(batch.steps)))
        places = torch.linspace(0, len(batch.steps) - 1, count).round().long()
        return tuple(batch.steps[place] for place in places.tolist())

    def step_of(self, part: RolloutBatch) -> int | None:
        """The denoising step that a part is of; None if it is of several."""
        return part.steps[0] if len(part.steps) == 1 else None

    def takes_graph(self, rows: int) -> bool:
        """As long as its passes are as large as the draw's: a step of all images each."""
        return self.steps_per_pass == 1 and (self.images_per_pass or rows) >= rows

    def live_steps(self, policy: Policy, batch: RolloutBatch) -> list[tuple[Tensor, Tensor]]:
        """`rollout_steps` under `policy.live`, taken from the draw where it kept their graph."""
        graph = self._graph_of(batch)
        kept = None if graph is None else graph.take(batch.steps, batch.rows)
        return self.steps_under(policy, policy.live, batch) if kept is None else kept

    def _graph_of(self, batch: RolloutBatch) -> KeptGraph | None:
        """The graph that the rollouts kept, if this learns from it: from one through the same branches of guidance."""
        graph = batch.graph
        if graph is None or graph.detach_uncond == self.detach_unconditional:
            return graph
        if graph.is_asked_for and self.detach_unconditional:
            raise UserError(
                "detach_unconditional: true, but the rollouts' `keep_graph` records gradients through both branches; "
                "leave one of the two out"
            )
        return None

    def steps_under(self, policy: Policy, predict: Predict, batch: RolloutBatch) -> list[tuple[Tensor, Tensor]]:
        """`rollout_steps`, with texts that are encoded once a pass."""
        of = (policy.backbone, batch.prompts, batch.cond, batch.negative_prompt)
        encoded = self._texts.get(of, lambda: _encode(policy, batch))
        return rollout_steps(policy, predict, batch, encoded, detach_uncond=self.detach_unconditional)


class TextsOfPass:
    """A pass's prompts [B rows] and negative prompt [1 row], encoded for its first steps and kept for the others."""

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._encoded: tuple[Cond, Cond] | None = None

    def get(self, of: tuple[object, ...], encode: Callable[[], tuple[Cond, Cond]]) -> tuple[Cond, Cond]:
        """What `encode` gives. Parts of the same images share the objects `of`, so that no other batch gets it."""
        if self._encoded is None or any(one is not other for one, other in zip(of, self._of, strict=True)):
            self._encoded, self._of = encode(), of
        return self._encoded


def _encode(policy: Policy, batch: RolloutBatch) -> tuple[Cond, Cond]:
    """The prompts [B rows] and the negative prompt [1 row]."""
    return batch.encode_text(policy.backbone), policy.backbone.encode_negative(batch.negative_prompt)


def rollout_steps(
    policy: Policy,
    predict: Predict,
    batch: RolloutBatch,
    encoded: tuple[Cond, Cond] | None = None,
    *,
    detach_uncond: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Mean [B, C, h, w] and standard deviation (0-d) of each of the batch's steps under `policy.live` or another.

    Guidance is applied as it was in sampling. `encoded`: prompts and negative prompt, where they are there already.
    """
    with guiding(policy.adapters.values(), batch.guidance_bank, batch.guidance_prompt):
        return step_distributions(
            predict,
            sampler_for(policy.backbone, batch.num_steps, batch.trajectory),
            batch.steps,
            batch.trajectory[:, list(batch.steps)],
            *(encoded or _encode(policy, batch)),
            guidance=batch.guidance,
            eta=batch.eta,
            noise=batch.noise,
            detach_uncond=detach_uncond,
        )


def log_probs_of(batch: RolloutBatch, distributions: list[tuple[Tensor, Tensor]]) -> Tensor:
    """log π of the states that the batch's steps reached, [B, S], under the distributions of these steps."""
    found = [
        log_density(batch.trajectory[:, k + 1], mean, std, noise=batch.noise)
        for k, (mean, std) in zip(batch.steps, distributions, strict=True)
    ]
    return torch.stack(found, dim=1)


NEEDS_MEANS = (
    "this objective compares each step's mean with the one that it was drawn with; add `keep_means: true` to its "
    "rollouts"
)


def check_keeps_means(source: Source) -> None:
    """UserError for a source that says that it does not keep its steps' means."""
    if source.keep_means is False:
        raise UserError(NEEDS_MEANS)


def old_means_of(batch: RolloutBatch) -> list[Tensor]:
    """The means [B, C, h, w] of the batch's steps as they were drawn; UserError if the source did not keep them."""
    if batch.means is None:
        raise UserError(NEEDS_MEANS)
    return [batch.means[:, k] for k in batch.steps]


def step_intervals(policy: Policy, batch: RolloutBatch) -> Tensor:
    """|Δt| of the batch's steps, [S], in units of t."""
    sampler = sampler_for(policy.backbone, batch.num_steps, batch.trajectory)
    levels = torch.cat([sampler.t.cpu(), torch.zeros(1)])
    return torch.stack([levels[k] - levels[k + 1] for k in batch.steps])


def step_log_prob(policy: Policy, batch: RolloutBatch, k: int) -> Tensor:
    """log π of the rollouts' step k under the live policy, [B]."""
    one = replace(batch, steps=(k,))
    return log_probs_of(one, rollout_steps(policy, policy.live, one))[:, 0]

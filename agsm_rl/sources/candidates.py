"""Drawing candidates for denoising steps from shared states, and pairing the best with the worst, as SPO does.

From one state, several candidates are drawn, each with noise of its own, and scored; the best and the worst make a
pair, and the next candidates begin at a random one, whatever its score (arXiv 2406.04314).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agsm_rl.policy import Policy
from agsm_rl.sources.trajectories import StepNoise
from agsm_rl.training.mixing import x0_estimate
from agsm_rl.training.randomness import Draw
from agsm_rl.training.sampling import guided, transition
from agsm_rl.training.step_scoring import States

Score = Callable[[States], tuple[Tensor, dict[str, Tensor]]]
"""What states are worth [B], and each reward's own scores [B] by name."""


@dataclass(frozen=True)
class Drawn:
    """The pairs of B rows at S steps; all tensors without gradients.

    `states` [B, S, 4, C, h, w]: before and after the step of the better candidate, then of the worse one. `gaps`
    [B, S]: how much more the better one is worth. `scores` [B, choices, candidates] by reward. `latents` [B, C, h, w]:
    the estimates of the images at the end.
    """

    states: Tensor
    gaps: Tensor
    scores: dict[str, Tensor]
    latents: Tensor

    @staticmethod
    def cat(parts: list["Drawn"]) -> "Drawn":
        """The rows of all parts, one after another."""
        scores = {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores}
        states, gaps, latents = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("states", "gaps", "latents")
        )
        return Drawn(states, gaps, scores, latents)


class CandidateDraw:
    """One draw's way through the denoising steps.

    Args:
        policy: Its live predictions draw.
        steps: The steps with candidates, one after another; those before them are drawn without.
        candidates: How many begin at each choice.
        steps_per_choice: Steps that each candidate goes by itself before they are compared.
        num_steps: Denoising steps of a whole image.
        guidance: Guidance scale of all predictions.
        negative_prompt: What guidance steers away from.
        noise: Of the steps.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        steps: tuple[int, ...],
        candidates: int,
        steps_per_choice: int,
        num_steps: int,
        guidance: float,
        negative_prompt: str,
        noise: StepNoise,
    ) -> None:
        self.policy, self.steps, self.candidates = policy, steps, candidates
        self.steps_per_choice, self.num_steps, self.guidance = steps_per_choice, num_steps, guidance
        self.negative_prompt = negative_prompt
        self.noise, self.sampler = noise, policy.backbone.sampler(num_steps)

    @torch.no_grad()
    def run(self, prompts: list[str], draw: Draw, rows: Tensor, score: Score) -> Drawn:
        """Draw and pair rows [B] by their numbers; `score` gets the first candidate of every row, then the second, …"""
        backbone, count = self.policy.backbone, self.candidates
        cond, uncond = backbone.encode_text(prompts), backbone.encode_negative(self.negative_prompt)
        repeated = cond[torch.arange(len(prompts)).repeat(count)]
        like = torch.empty(len(prompts), *backbone.latent_shape, device=backbone.device, dtype=cond.embeds.dtype)

        def predict(x: Tensor, k: int) -> Tensor:
            t = self.sampler.t[k].to(x.device).expand(len(x))
            return guided(self.policy.live, x, t, cond if len(x) == len(prompts) else repeated, uncond, self.guidance)

        x = draw.noise_like(like, rows, purpose="start")
        for k in range(self.steps[0]):
            x = self._step(k, x, predict(x, k), draw, rows)
        prediction = predict(x, self.steps[0])
        states, gaps, scores = [], [], []
        way: list[Tensor] = []
        for place, k in enumerate(self.steps):
            if not way:
                x, prediction = (value.repeat(count, 1, 1, 1) for value in (x, prediction))
            before, x = x, self._step(k, x, prediction, draw, rows)
            way.append(torch.stack([before, x], dim=1))
            ends = k == self.steps[-1]
            if k + 1 < self.num_steps:
                prediction = predict(x, k + 1)
            if not ends and (place + 1) % self.steps_per_choice:
                continue
            seen = self._seen(x, prediction, k + 1)
            worth, each = score(seen)
            found, gap = _best_and_worst(torch.stack(way, dim=1), worth, count)
            states.append(found)
            gaps.append(gap[:, None].expand(-1, len(way)))
            scores.append({name: value.unflatten(0, (count, -1)).T for name, value in each.items()})
            picked = self._picked(draw, rows, k).to(x.device)
            x, prediction, latents, way = x[picked], prediction[picked], seen.x0[picked], []
        by_reward = {name: torch.stack([one[name] for one in scores], dim=1) for name in scores[0]}
        return Drawn(torch.cat(states, dim=1), torch.cat(gaps, dim=1), by_reward, latents)

    def _step(self, k: int, x: Tensor, prediction: Tensor, draw: Draw, rows: Tensor) -> Tensor:
        """The states after step k, each candidate with noise of its own."""
        level = self.noise.at(k)
        mean, std = transition(self.sampler, k, x, prediction, eta=level, noise=self.noise.form)
        if not level:
            return mean.to(x.dtype)
        purposes = [f"step {k} candidate {number}" for number in range(len(x) // len(rows))]
        added = torch.cat([draw.noise_like(x[: len(rows)], rows, purpose=purpose) for purpose in purposes])
        return (mean + std * added).to(x.dtype)

    def _seen(self, x: Tensor, prediction: Tensor, k: int) -> States:
        """The states before step k, or the finished images, as rewards see them: copies, which they may change."""
        backbone = self.policy.backbone
        if k == self.num_steps:
            return States(x.clone(), x.clone(), torch.zeros(len(x), device=x.device), backbone.decode)
        t = self.sampler.t[k].to(x.device).expand(len(x))
        return States(x.clone(), x0_estimate(backbone, x, prediction, t), t, backbone.decode)

    def _picked(self, draw: Draw, rows: Tensor, k: int) -> Tensor:
        """Where in all candidates each row's random one is, [B]."""
        share = draw.uniform(rows, purpose=f"pick {k}")
        number = (share * self.candidates).long().clamp(max=self.candidates - 1)
        return number * len(rows) + torch.arange(len(rows))


def _best_and_worst(way: Tensor, worth: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The steps [B, s, 4, C, h, w] of each row's best and worst candidate, and how much their `worth` differs, [B].

    `way` [candidates · B, s, 2, C, h, w] holds the states before and after each step, `worth` [candidates · B].
    """
    worth, way = worth.unflatten(0, (candidates, -1)), way.unflatten(0, (candidates, -1))
    best, worst = worth.argmax(dim=0), worth.argmin(dim=0)
    every = torch.arange(len(best), device=best.device)
    return torch.cat([way[best, every], way[worst, every]], dim=2), worth[best, every] - worth[worst, every]

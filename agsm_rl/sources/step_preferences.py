"""Preferences between candidates of single denoising steps, drawn from the live policy: what SPO learns from."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Reward, StepPreferenceBatch
from agsm_rl.policy import Policy
from agsm_rl.sources.candidates import CandidateDraw, Drawn
from agsm_rl.sources.draws import Draws
from agsm_rl.sources.trajectories import StepNoise, check_has_guidance, check_latents, check_noise, choose_noise
from agsm_rl.training.randomness import Draw, stream
from agsm_rl.training.scoring import WeightedReward, check_rewards, weighted_sum
from agsm_rl.training.sizes import PictureSize
from agsm_rl.training.stages import stage
from agsm_rl.training.step_scoring import States, scores_of_states


class StepPreferences(Draws[StepPreferenceBatch]):
    """Pairs of candidates for single denoising steps, drawn from the policy: the best against the worst of a state.

    Each prompt has one image under way. From `first_step` on, several candidates for the next state are drawn and
    scored; the best and the worst make a pair, and the image goes on from a random one. A reward that judges unfinished
    images (`step_aware_preference`) sees the state and its noise level; any other one sees the image that the model
    expects at the end of it, decoded. The defaults are the authors' for SD1.5 (arXiv 2406.04314).

    Args:
        prompts: `builtin:shapes-prompts`; a text file with one prompt per line; a jsonl, json, csv, tsv or parquet
            table with a column `prompt`; or a folder or a name on the hub (`owner/name`) that holds one.
        rewards: Rewards by name, with weights or options: `{pick_score: 1.0}`. Candidates are compared by the weighted
            sum. `normalise` has no place here: only candidates of one state are compared.
        num_prompts: Prompts per draw, the total over all processes. Published: 40 (10 on each of 4 GPUs), SDXL 8.
        candidates: Candidates per choice, 2 or more. Published: 4, SDXL 2.
        num_steps: Denoising steps per image. Published: 20.
        first_step: Steps before the first choice, which are not learned from. Published: 4.
        steps_per_choice: Steps that each candidate goes by itself before they are compared; all of them are learned
            from. Published: 1, SDXL 4.
        threshold: Pairs are dropped unless P(best) − P(worst) is above this, by softmax of their worths, in [0, 1):
            tanh(difference/2). It is meant for rewards in log-odds, as PickScore's; weigh others to be of such a size.
            With 0, only ties are dropped. Published: 0.3, SDXL 0.4.
        guidance: Guidance scale; 1 is none and costs half. Published: 5.
        negative_prompt: What guidance steers away from, in the draw and in learning.
        noise: Form of the steps' noise, as of `rollouts`. Null: `flow_sde` for flow models, else `ddim`.
        noise_level: Level a of `flow_sde` (above 0) and `cps` (up to 1). Null: 0.7.
        eta: Noise of `ddim` steps, in (0, 1]. Published: 1.
        updates: Steps of the trainer that learn from each draw, each from its own share of every image's steps.
            Published: one per 40 pairs, which is 16 where none is dropped.
        sample_batch_size: Candidates that are drawn at once, at most. Where so many do not fit the memory, the number
            is halved from then on, with a warning.
        prompt_column: Name of the column that holds the prompts. Null looks for a usual one.
        prompt_split: Split of a data set of prompts; null is its first one.
        prompt_config: Configuration of a data set of prompts that has several.
        resolution: Pixels per side, or [height, width], of the images that are drawn. Null: the backbone's.
    """

    gives: type[Batch] = StepPreferenceBatch

    def __init__(
        self,
        prompts: str,
        rewards: Sequence[WeightedReward | tuple[Reward, float]] | Mapping[str, float],
        *,
        num_prompts: int = 8,
        candidates: int = 4,
        num_steps: int = 20,
        first_step: int = 4,
        steps_per_choice: int = 1,
        threshold: float = 0.3,
        guidance: float = 5.0,
        negative_prompt: str = "",
        noise: Literal["flow_sde", "cps", "ddim"] | None = None,
        noise_level: float | None = None,
        eta: float = 1.0,
        updates: int = 1,
        sample_batch_size: int = 64,
        prompt_column: str | None = None,
        prompt_split: str | None = None,
        prompt_config: str | None = None,
        resolution: PictureSize | None = None,
    ) -> None:
        positive = {
            "num_prompts": num_prompts,
            "num_steps": num_steps,
            "steps_per_choice": steps_per_choice,
            "updates": updates,
            "sample_batch_size": sample_batch_size,
        }
        for name, value in positive.items():
            if value < 1:
                raise UserError(f"{name}: got {value}, but it must be 1 or more")
        if candidates < 2:
            raise UserError(f"candidates: got {candidates}, but a pair needs 2 or more (published: 4)")
        check_noise(noise, noise_level, eta, num_steps)
        if not 0 <= first_step < num_steps:
            raise UserError(f"first_step: got {first_step}, but it must be one of the {num_steps} steps, from 0 on")
        if not 0 <= threshold < 1:
            raise UserError(f"threshold: got {threshold}, but it must lie in [0, 1) (published: 0.3, SDXL 0.4)")
        check_has_guidance(guidance, negative_prompt=negative_prompt)
        if eta == 0:
            raise UserError("eta: got 0, but without noise all candidates are the same; set it above 0 (published: 1)")
        self.rewards = check_rewards(rewards)
        if normalised := [item.name for item in self.rewards if item.normalise != "raw"]:
            raise UserError(
                f"rewards.{normalised[0]}: `normalise` compares images of different prompts, but here only candidates "
                "of one state are compared; leave it out, and set the reward's weight"
            )
        self.prompts, self.prompt_column, self.resolution = prompts, prompt_column, resolution
        self.prompt_split, self.prompt_config = prompt_split, prompt_config
        self.num_prompts, self.candidates, self.num_steps = num_prompts, candidates, num_steps
        self.first_step, self.steps_per_choice, self.threshold = first_step, steps_per_choice, threshold
        self.guidance, self.noise, self.noise_level, self.eta = guidance, noise, noise_level, eta
        self.negative_prompt = negative_prompt
        self.updates, self.sample_batch_size, self.drawn_at_once = updates, sample_batch_size, candidates

    def images_drawn(self) -> int:
        """Candidates that are finished images, since the run began, over all processes."""
        return self._draws * self.num_prompts * self.candidates

    @torch.no_grad()
    def _draw(self, policy: Policy) -> list[StepPreferenceBatch]:
        """The pairs of each update; where all are dropped, a batch without rows, in all processes alike."""
        chosen = self._order.take(self.num_prompts)
        share = len(chosen) // self._shard.count
        rows = torch.arange(self._shard.index * share, (self._shard.index + 1) * share)
        draw = Draw(self._seed, self._name, self._draws)
        noise, steps = self._noisy_steps(policy)
        way = CandidateDraw(
            policy,
            steps=steps,
            candidates=self.candidates,
            steps_per_choice=self.steps_per_choice,
            num_steps=self.num_steps,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt,
            noise=noise,
        )
        with stage(f"{self._name}: drawing", total=share, unit="images") as advance:

            def draw_part(part: Tensor) -> Drawn:
                asked = [chosen[row] for row in part.tolist()]
                drawn = way.run([self._prompts[row] for row in asked], draw, part, self._scorer(asked))
                advance(len(part))
                return drawn

            drawn = Drawn.cat(self._parts.run(rows, draw_part))
        prompts = [self._prompts[row] for row in chosen]
        self._metrics["x0_norm"] = check_latents(
            drawn.latents, prompts, self._shard, name=self._name, first=not self._draws
        )
        kept = self._kept(drawn)
        return [self._share(number, drawn, kept, chosen, rows, steps, noise) for number in range(self.updates)]

    def _noisy_steps(self, policy: Policy) -> tuple[StepNoise, tuple[int, ...]]:
        """The noise of all steps, and the steps with candidates."""
        sampler = policy.backbone.sampler(self.num_steps)
        noise = choose_noise(
            sampler, self.num_steps, noise=self.noise, eta=self.eta, noise_level=self.noise_level, window=None
        )
        steps = tuple(k for k in noise.noisy_steps(sampler, self.num_steps) if k >= self.first_step)
        if not steps:
            raise UserError(f"{self._name}: first_step: no step from {self.first_step} on has noise; lower it")
        if len(steps) < self.updates:
            raise UserError(
                f"{self._name}: updates: {self.updates}, but each image has only {len(steps)} steps to share out, "
                f"those with noise from first_step {self.first_step} on"
            )
        return noise, steps

    def _scorer(self, asked: list[int]) -> Any:
        """What scores all candidates of the prompts with these numbers, the first candidate of each prompt first."""
        numbers = asked * self.candidates
        prompts = [self._prompts[number] for number in numbers]
        metadata = [self._metadata[number] for number in numbers]

        def score(states: States) -> tuple[Tensor, dict[str, Tensor]]:
            found = scores_of_states(self.rewards, states, prompts, metadata)
            return weighted_sum(self.rewards, found), found

        return score

    def _kept(self, drawn: Drawn) -> Tensor:
        """Which pairs of all processes differ enough, [N, S] on the CPU; notes the draw's metrics."""
        scores = {name: self._shard.gather(score.float()).cpu() for name, score in drawn.scores.items()}
        for name, score in scores.items():
            self._metrics[f"reward/{name}"] = float(score.mean())
            constant = bool((score == score.flatten()[0]).all())
            self._metrics[f"reward_std/{name}"] = 0.0 if constant else float(score.std(correction=0))
        self._metrics["reward"] = float(weighted_sum(self.rewards, scores).mean())
        gaps = self._shard.gather(drawn.gaps.float())
        # A rehearsal has no values, and all pairs to learn from.
        kept = torch.ones(gaps.shape, dtype=torch.bool) if gaps.is_meta else (gaps / 2).tanh().cpu() > self.threshold
        self._metrics["pairs_kept"] = float(kept.float().mean())
        return kept

    def _share(
        self,
        number: int,
        drawn: Drawn,
        kept: Tensor,
        chosen: list[int],
        rows: Tensor,
        steps: tuple[int, ...],
        noise: StepNoise,
    ) -> StepPreferenceBatch:
        """This process's pairs of an update: of each image some steps, none of them in two updates.

        `chosen`: the numbers of all processes' prompts.
        """
        places = torch.zeros_like(kept)
        for row in range(len(kept)):
            order = stream(self._seed, f"{self._name}/updates", self._draws, row).permutation(len(steps))
            places[row, torch.from_numpy(np.ascontiguousarray(order[number :: self.updates]))] = True
        total = int((kept & places).sum())
        mine = (kept & places)[rows].nonzero()
        weight = len(mine) * self._shard.count / total if total else 0.0
        if total and not len(mine):
            mine = places[rows].nonzero()[:1]  # takes part in the exchange of gradients, and counts nothing
        images, at = mine.unbind(1)
        states = drawn.states[images.to(drawn.states.device), at.to(drawn.states.device)]
        return StepPreferenceBatch(
            prompts=[self._prompts[chosen[row]] for row in rows[images].tolist()],
            metadata=[self._metadata[chosen[row]] for row in rows[images].tolist()],
            rows=rows[images] * len(steps) + at,
            step=torch.tensor(steps)[at],
            chosen_from=states[:, 0],
            chosen=states[:, 1],
            rejected_from=states[:, 2],
            rejected=states[:, 3],
            weight=torch.full((len(mine),), weight, device=states.device),
            num_steps=self.num_steps,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt,
            eta=noise.level,
            noise=noise.form,
            same_start=self.steps_per_choice == 1,
        )

    def metrics(self) -> dict[str, float]:
        """Of the newest draw, over all processes.

        `reward/<name>` and `reward_std/<name>`: mean and spread of all candidates' scores; `reward`: the weighted sum
        of the means; `pairs_kept`: the share of pairs above the threshold; `x0_norm`: as of rollouts.
        """
        return dict(self._metrics)

    def _restored(self, kept: Mapping[str, Any]) -> StepPreferenceBatch:
        return StepPreferenceBatch(**kept)

"""On-policy sampling as a source: images drawn from the live policy, the path that led to them, and their rewards."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, Literal, cast

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Batch, Reward, RewardedBatch, RolloutBatch, Sampler, Shard
from agsm_rl.policy import Policy
from agsm_rl.sources.advantages import (
    Histories,
    check_advantages,
    normalised_by_group,
    normalised_by_prompt,
    normalised_over_all,
)
from agsm_rl.sources.draws import Draws
from agsm_rl.sources.rows import check_divides
from agsm_rl.sources.trajectories import (
    SDEWindow,
    StepNoise,
    check_has_guidance,
    check_has_noise,
    check_keeps,
    check_latents,
    check_noise,
    choose_noise,
    draw_trajectories,
)
from agsm_rl.training.compiled import is_compiled
from agsm_rl.training.guidance import GuidanceBank, GuidancePrompt, guiding
from agsm_rl.training.kept_graph import KeptGraph, Room
from agsm_rl.training.randomness import Draw
from agsm_rl.training.scoring import InParts, WeightedReward, check_rewards, weighted_sum
from agsm_rl.training.sizes import PictureSize
from agsm_rl.training.stages import stage


class Rollouts(Draws[RewardedBatch]):
    """Images drawn from the policy, the path of noisy steps that led to them, and their rewards.

    Steps without noise, such as a flow's last one, are not learned from. With `eta: 0` only the first noise is random:
    no path is kept, and objectives that learn from finished images alone (DiffusionNFT, AGSM) need none. Rewards that
    run elsewhere score one part of the images while the next is drawn.

    Args:
        prompts: `builtin:shapes-prompts`; a text file with one prompt per line; a jsonl, json, csv, tsv or parquet
            table with a column `prompt`; or a folder or a name on the hub (`owner/name`) that holds one.
        rewards: Rewards by name, with weights or options: `{shapes: 1.0}`. Their weighted sum is learned. In Python,
            functions and reward objects go in as (reward, weight) pairs or WeightedRewards. A reward with
            `normalise: z_score` is normalised by itself, as `advantages` says, before the sum; a sum of such rewards
            alone is then normalised once more over all images of the draw (with `advantages: group` that is GDPO,
            arXiv 2601.05242).
        num_prompts: Prompts per draw, the total over all processes.
        images_per_prompt: Images per prompt and draw.
        num_steps: Denoising steps per image. DDPO's published setting: 50 (arXiv 2305.13301).
        guidance: Guidance scale; 1 is none and costs half. DDPO's published setting: 5.
        negative_prompt: What guidance steers away from, in the draw and in the losses that learn from it.
        guidance_bank: Bank of guidance's unconditional branch in drawing and learning, `positive` or `negative`; the
            conditional branch keeps ψ⁺. Null: as the adapters say.
        guidance_prompt: Prompt of that branch, `empty` or the `same`. Null: as the adapters say.
        noise: Form of the steps' noise. Null: `flow_sde` for flow models, else `ddim`. `flow_sde`: Flow-GRPO's SDE,
            without noise in the last step.
            `cps`: coefficients-preserving sampling (arXiv 2509.05952), whose log-probability leaves 1/(2σ²) out.
            `ddim`: DDIM's, for flow models a step with the ODE's marginals; there late steps are almost noiseless and
            rule a policy gradient. It was the only one in earlier versions.
        noise_level: Level a of `flow_sde` (above 0) and `cps` (up to 1). Null: 0.7, Flow-GRPO's published setting.
        eta: Noise of `ddim` steps, in [0, 1]. DDPO's published setting: 1. With 0, no steps have noise, of any form.
        sde_window: Noise, and learning, in a few consecutive steps only; the others follow the ODE: `{size: 2, range:
            [0, 5], move: random}` (Flow-GRPO-Fast). `range`: the steps [first, end) that it stays in; by default the
            first half. `move`: `random`, another place for each draw, or a number n: a step further every n draws, and
            at the end back to the first (MixGRPO, arXiv 2507.21802: size 4, move 25).
        same_latent: All images of a prompt begin from the same noise, so that only the steps' noise tells them apart
            (flow_grpo's `sample.same_latent`; MixGRPO). It suits an `sde_window`, whose few steps then answer for all
            differences in reward. It needs `eta` above 0.
        drawn_by: `live`, the parameters being trained, or `ema`, whose path is not kept: a policy gradient's ratios to
            it would leave the clip range at once, and nothing would be learned. `old`: the old policy of the first
            term that has one (`old` of `diffusion_nft`), first of those that learn now; of none, the EMA.
        updates: Steps of the trainer that learn from each draw, each from its own share of the images.
        advantages: What a reward is compared with. `history`: the newest rewards of its prompt, as DDPO does; `group`:
            the rewards of the prompt's images of this draw alone, as GRPO does. `{by: group, std: global}` divides by
            the standard deviation of all rewards of the draw, as Flow-GRPO's configurations for SD3.5 do. With
            `transform: exponential`, an image counts by 1 − exp(−A): DDRL's λ (arXiv 2512.04332) but for the constant.
        advantage_clip: Advantages are clipped to ± this.
        history: For `advantages: history`: how many rewards of each prompt are remembered.
        min_history: For `advantages: history`: as long as a prompt has fewer rewards, the mean and standard deviation
            of all images of the draw are used.
        sample_batch_size: Images that are drawn at once, at most. Where so many do not fit the memory, the number is
            halved from then on, with a warning.
        prompt_column: Name of the column that holds the prompts. Null looks for a usual one.
        prompt_split: Split of a data set of prompts; null is its first one.
        prompt_config: Configuration of a data set of prompts that has several.
        keep_graph: Record the draw's predictions with their graph, so that a policy gradient does not compute them
            again: the same gradient for one forward and one backward pass per step instead of two and one. The
            activations of all images and steps are then held together, whatever `sample_batch_size` and
            `images_per_pass`, so it is for small models and few steps, or for gradient checkpointing (`agsm-rl check`
            predicts the memory). It needs `updates: 1`, `drawn_by: live` and `eta` above 0. Of several policy gradients
            on one source, only the first that learns in a step gains: put it first. Every draw pays for it, also where
            no policy gradient is due; DiffusionNFT and AGSM do not use it.
        graph_memory: Share of the free memory, in [0, 1), that the draw's graph may take without `keep_graph`: learning
            is then faster, and the same. That is so where a policy gradient is due that learns from all images in one
            pass per step (no `images_per_pass`, `steps_per_pass` or view), the process draws all its images at once
            (`sample_batch_size`), and what `keep_graph` needs is given. What the graph takes is measured at the first
            step that has one. 0: never.
        keep_means: Keep the means of a draw's steps, as many numbers as its path has, for objectives that compare with
            them (GRPO-Guard, Flow-DPPO). It needs `drawn_by: live` and `eta` above 0.
        resolution: Pixels per side, or [height, width], of the images that are drawn. Null: the backbone's.
    """

    gives: type[Batch] = RolloutBatch
    batch_size: int
    images_per_prompt: int

    def __init__(
        self,
        prompts: str,
        rewards: Sequence[WeightedReward | tuple[Reward, float]] | Mapping[str, float],
        *,
        num_prompts: int = 8,
        images_per_prompt: int = 8,
        num_steps: int = 50,
        guidance: float = 5.0,
        negative_prompt: str = "",
        guidance_bank: GuidanceBank | None = None,
        guidance_prompt: GuidancePrompt | None = None,
        noise: Literal["flow_sde", "cps", "ddim"] | None = None,
        noise_level: float | None = None,
        eta: float = 1.0,
        sde_window: Mapping[str, Any] | None = None,
        same_latent: bool = False,
        drawn_by: Literal["live", "ema", "old"] = "live",
        updates: int = 1,
        advantages: str | dict[str, str] = "history",
        advantage_clip: float = 5.0,
        history: int = 32,
        min_history: int = 16,
        sample_batch_size: int = 64,
        prompt_column: str | None = None,
        prompt_split: str | None = None,
        prompt_config: str | None = None,
        keep_graph: bool = False,
        graph_memory: float = 0.5,
        keep_means: bool = False,
        resolution: PictureSize | None = None,
    ) -> None:
        positive = {
            "num_prompts": num_prompts,
            "images_per_prompt": images_per_prompt,
            "num_steps": num_steps,
            "updates": updates,
            "advantage_clip": advantage_clip,
            "history": history,
            "min_history": min_history,
            "sample_batch_size": sample_batch_size,
        }
        for name, value in positive.items():
            if value <= 0:
                raise UserError(f"{name}: got {value}, but it must be above 0")
        check_noise(noise, noise_level, eta, num_steps, same_latent=same_latent)
        check_has_noise(eta, noise_level=noise_level, sde_window=sde_window)
        branch = {"guidance_bank": guidance_bank, "guidance_prompt": guidance_prompt}
        check_has_guidance(guidance, negative_prompt=negative_prompt, **branch)
        self.advantages = check_advantages(
            advantages, images_per_prompt=images_per_prompt, history=history, min_history=min_history
        )
        if (num_prompts * images_per_prompt) % updates:
            raise UserError(f"updates {updates} does not divide the {num_prompts} x {images_per_prompt} images")
        check_keeps(keep_graph, graph_memory, keep_means, updates=updates, drawn_by=drawn_by, eta=eta)
        self.prompts, self.prompt_column, self.resolution = prompts, prompt_column, resolution
        self.prompt_split, self.prompt_config, self.rewards = prompt_split, prompt_config, check_rewards(rewards)
        self.keep_graph, self.graph_memory, self.keep_means = keep_graph, graph_memory, keep_means
        self.num_prompts, self.images_per_prompt, self.num_steps = num_prompts, images_per_prompt, num_steps
        self.guidance, self.eta, self.updates = guidance, eta, updates
        self.guidance_bank, self.guidance_prompt = guidance_bank, guidance_prompt
        self.negative_prompt, self.noise, self.noise_level = negative_prompt, noise, noise_level
        self.sde_window = None if sde_window is None else SDEWindow(sde_window, num_steps)
        self.advantage_clip, self.history, self.min_history = advantage_clip, history, min_history
        self.sample_batch_size, self.drawn_by, self.same_latent = sample_batch_size, drawn_by, same_latent
        self.batch_size = num_prompts * images_per_prompt // updates
        """Images that a step of the trainer learns from."""
        self.keep_path = eta > 0 and drawn_by == "live"
        if not self.keep_path:
            self.gives = RewardedBatch

    def images_drawn(self) -> int:
        """Images drawn since the run began, over all processes."""
        return self._draws * self.num_prompts * self.images_per_prompt

    def bind(self, name: str, seed: int, shard: Shard) -> None:
        """Read the prompts; UserError if there are none, or a reward cannot judge one of them."""
        super().bind(name, seed, shard)
        check_divides("num_prompts * images_per_prompt / updates, which is", self.batch_size, shard, name)
        self._histories: Histories = {}
        self._own_histories: dict[str, Histories] = {}
        self._room: Room | None = None
        self._has_room = True

    def _draw(self, policy: Policy) -> list[RewardedBatch]:
        batch = self._drawn(policy)
        return [batch.select(torch.arange(part, len(batch), self.updates)) for part in range(self.updates)]

    @torch.no_grad()
    def _drawn(self, policy: Policy) -> RewardedBatch:
        chosen = self._order.take(self.num_prompts)
        prompts = [self._prompts[row] for row in chosen for _ in range(self.images_per_prompt)]
        metadata = [self._metadata[row] for row in chosen for _ in range(self.images_per_prompt)]
        share = len(prompts) // self._shard.count
        first = self._shard.index * share
        rows = torch.arange(first, first + share)
        draw = Draw(self._seed, self._name, self._draws)
        sampler = policy.backbone.sampler(self.num_steps)
        noise = self._step_noise(sampler)
        steps = noise.noisy_steps(sampler, self.num_steps)
        graph = self._graph(policy, rows, steps)
        with InParts(self.rewards) as scoring:

            def add(images: Tensor, part: list[int]) -> None:
                scoring.add(images, [prompts[row] for row in part], [metadata[row] for row in part])

            trajectory, log_probs, means, graph = self._paths(policy, prompts, draw, rows, noise, graph, add)
            own, latents = [prompts[row] for row in rows.tolist()], trajectory[:, -1]
            self._metrics["x0_norm"] = check_latents(
                latents, prompts, self._shard, name=self._name, first=not self._draws
            )
            # What all processes drew, in one order: so that any number of them gives the same figures.
            scores = {name: self._shard.gather(score).cpu() for name, score in scoring.scores().items()}
        worth, advantages = self._worth(scores, prompts)
        found: dict[str, Any] = {"prompts": own, "rows": rows, "latents": latents}
        found |= {"metadata": [metadata[row] for row in rows.tolist()], "groups": rows // self.images_per_prompt}
        found |= {"rewards": worth[rows].to(latents.device), "advantages": advantages[rows].to(latents.device)}
        if not self.keep_path:
            return RewardedBatch(**found)
        return RolloutBatch(
            **found,
            trajectory=trajectory,
            log_probs=log_probs,
            num_steps=self.num_steps,
            steps=steps,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt,
            guidance_bank=self.guidance_bank,
            guidance_prompt=self.guidance_prompt,
            eta=noise.level,
            noise=noise.form,
            graph=graph,
            means=means,
        )

    def _paths(
        self,
        policy: Policy,
        prompts: list[str],
        draw: Draw,
        rows: Tensor,
        noise: StepNoise,
        graph: KeptGraph | None,
        add: Callable[[Tensor, list[int]], None],
    ) -> tuple[Tensor, Tensor, Tensor | None, KeptGraph | None]:
        """The rows' paths, log-probabilities and means, drawn in parts that fit, and the graph if that was kept.

        `add` is given each part's images and rows.
        """

        def draw_part(part: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            asked = [prompts[row] for row in part.tolist()]
            means: list[Tensor] = []
            path, log_probs = draw_trajectories(
                policy,
                asked,
                draw,
                part,
                num_steps=self.num_steps,
                guidance=self.guidance,
                noise=noise,
                negative_prompt=self.negative_prompt,
                starts=part // self.images_per_prompt * self.images_per_prompt if self.same_latent else None,
                keep_path=self.keep_path,
                graph=graph,
                means=means if self.keep_means else None,
            )
            with stage(f"decoding {len(asked)} images", worth=len(asked)):
                images = policy.backbone.decode(path[:, -1])
            add(images, part.tolist())
            advance(len(asked))
            return path, log_probs, [torch.stack(means, dim=1)] if means else []

        def without_graph() -> bool:
            nonlocal graph
            if graph is None or graph.is_asked_for:
                return False
            graph, self._has_room = None, False
            return True

        weights = {"live": nullcontext, "ema": policy.ema_weights, "old": policy.old_weights}[self.drawn_by]
        form = guiding(policy.adapters.values(), self.guidance_bank, self.guidance_prompt)
        what = f"{self._name.removeprefix('sources.')}: drawing"
        with weights(), form, stage(what, total=len(rows), unit="images") as advance:
            parts = self._parts.run(rows, draw_part, halve=not self.keep_graph, lighten=without_graph)
        path, log_probs = (torch.cat([part[number] for part in parts]) for number in (0, 1))
        means = [one for *_, kept in parts for one in kept]
        return path, log_probs, torch.cat(means) if means else None, graph

    def _graph(self, policy: Policy, rows: Tensor, steps: tuple[int, ...]) -> KeptGraph | None:
        """What keeps the draw's graph: if it is asked for, or, where it changes no number, as long as there is room."""
        taker = policy.graph_for
        detach = taker is not None and taker.detach_unconditional
        if self.keep_graph:
            return KeptGraph(rows, steps, detach_uncond=detach)
        is_same = taker is not None and self._has_room and self.updates == 1 and len(rows) <= self._parts.size
        if not (is_same and self.keep_path and steps and self.graph_memory and policy.backbone.device.type != "meta"):
            return None
        if is_compiled(policy.backbone.denoiser):  # saved tensors cannot be measured, and CUDA graphs reuse them
            return None
        if self._room is None:
            self._room = Room(self.graph_memory, policy.backbone.denoiser)
        if self._room.fits is False:
            return None
        return KeptGraph(rows, steps, room=self._room, detach_uncond=detach)

    def _step_noise(self, sampler: Sampler) -> StepNoise:
        window = None if self.sde_window is None else self.sde_window.at(self._seed, self._name, self._draws)
        return choose_noise(
            sampler, self.num_steps, noise=self.noise, eta=self.eta, noise_level=self.noise_level, window=window
        )

    def _worth(self, scores: dict[str, Tensor], prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The weighted sum of rewards and the advantages, [N] each, of all processes' scores [N] by name."""
        for name, score in scores.items():
            self._metrics[f"reward/{name}"] = float(score.mean())
            self._metrics[f"reward_std/{name}"] = 0.0 if _all_equal(score) else float(score.std(correction=0))
        self._metrics["reward"] = float(weighted_sum(self.rewards, scores).mean())
        units = {
            one.name: self._normalised(scores[one.name], prompts, self._own_histories.setdefault(one.name, {}))
            for one in self.rewards
            if one.normalise == "z_score"
        }
        worth = weighted_sum(self.rewards, scores | units)
        if any(one.weight and one.normalise == "raw" for one in self.rewards):
            return worth, self._advantages(worth, prompts)
        self._metrics["zero_variance"] = float(_all_equal(worth))
        return worth, self.advantages.finished(normalised_over_all(worth), self.advantage_clip)

    def _advantages(self, rewards: Tensor, prompts: list[str]) -> Tensor:
        """Normalised rewards of all processes, [N] in the order of `prompts`."""
        self._metrics["zero_variance"] = float(_all_equal(rewards))
        normalised = self._normalised(rewards, prompts, self._histories)
        return self.advantages.finished(normalised, self.advantage_clip)

    def _normalised(self, rewards: Tensor, prompts: list[str], histories: Histories) -> Tensor:
        if self.advantages.by == "group":
            return normalised_by_group(rewards, prompts, std=self.advantages.std)
        return normalised_by_prompt(rewards, prompts, histories, history=self.history, min_history=self.min_history)

    def metrics(self) -> dict[str, float]:
        """Of the newest draw, over all processes.

        `reward/<name>` and `reward_std/<name>`: mean and spread in the reward's own unit; `reward`: the weighted sum of
        the means; `zero_variance`: 1 when all images are worth the same; `x0_norm`: the root mean square of the latents
        of the largest image.
        """
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Position, reward histories, and the rollouts not yet learned from."""
        return super().state_dict() | {
            "histories": _plain(self._histories),
            "own_histories": {name: _plain(histories) for name, histories in self._own_histories.items()},
            "keeps_no_graph": not self._has_room or (self._room is not None and self._room.fits is False),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; UserError if that would lose other processes' rollouts."""
        super().load_state_dict(state)
        self._histories = self._continued(state["histories"])
        # Checkpoints of earlier versions have none: their rewards were all raw.
        own = state.get("own_histories", {})
        self._own_histories = {name: self._continued(histories) for name, histories in own.items()}
        self._has_room = not state.get("keeps_no_graph", False)

    def _restored(self, kept: Mapping[str, Any]) -> RewardedBatch:
        # Checkpoints of earlier versions hold the path of what the EMA drew too.
        wanted = {item.name for item in fields(self.gives)}
        found = {name: value for name, value in kept.items() if name in wanted}
        return cast(type[RewardedBatch], self.gives)(**found)

    def _continued(self, histories: Mapping[str, list[float]]) -> Histories:
        return {prompt: deque(past, maxlen=self.history) for prompt, past in histories.items()}


def _plain(histories: Histories) -> dict[str, list[float]]:
    return {prompt: list(past) for prompt, past in histories.items()}


def _all_equal(rewards: Tensor) -> bool:
    return bool((rewards == rewards[0]).all())

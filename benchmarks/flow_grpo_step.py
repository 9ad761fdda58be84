"""Our Flow-GRPO against one with its authors' cost model (published_flow_grpo.py): images sampled and trained a second.

    python benchmarks/flow_grpo_step.py

Both learn the same LoRA on the embedded SD3 base, as the authors' configurations do it: 10 steps, guidance 4.5, all but
the last step learned from, KL to the base, no gradient through the unconditional branch. The script first checks that
the two have the same gradient on one draw, and then times their steps in turn.
"""

from pathlib import Path
from typing import Annotated

import measure
import torch
import typer
from agsm_rl_rewards.brightness import Brightness
from published_flow_grpo import PublishedFlowGRPO, Settings
from torch import Tensor

from agsm_rl import Policy, Term, Trainer
from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.objectives.flow_grpo import FlowGRPO
from agsm_rl.sources.prompt_lists import read_prompts
from agsm_rl.sources.rollouts import Rollouts

BASE = "builtin:shapes-sd3"
TOLERANCE = 1e-4
"""Relative, for the gradient: float32 results depend on the order of summation."""


def make_policy() -> Policy:
    """A LoRA that has moved away from the base, so that the KL has a gradient."""
    policy = Policy(load_backbone(BASE, device="cpu"), {"lora": LoRA(rank=4)})
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters().values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy


class Sides:
    """Both trainers, each with its own base."""

    def __init__(self, prompts: int, settings: Settings) -> None:
        reward, self.settings = Brightness(), settings
        texts = list(dict.fromkeys(prompt.text for prompt in read_prompts("builtin:shapes-prompts")))[:prompts]
        self.prompts = [text for text in texts for _ in range(settings.group_size)]
        self.objective = FlowGRPO(
            kl_weight=settings.beta,
            kl="published",
            detach_unconditional=True,
            timestep_fraction=settings.num_train_timesteps / settings.num_steps,
            clip_range=settings.clip_range,
            images_per_pass=settings.batch_size,
        )
        self.source = Rollouts(
            "builtin:shapes-prompts",
            [(reward, 1.0)],
            num_prompts=prompts,
            images_per_prompt=settings.group_size,
            num_steps=settings.num_steps,
            guidance=settings.guidance_scale,
            advantages="group",
        )
        self.trainer = Trainer(
            make_policy(),
            [Term(self.objective, self.source, name="flow_grpo")],
            steps=1,
            learning_rate=settings.learning_rate,
        )
        other = make_policy()
        self.published = PublishedFlowGRPO(
            other.backbone.pipeline,
            list(other.parameters().values()),
            base=other.switched_off,
            reward=reward,
            latent_shape=other.backbone.latent_shape,
            settings=settings,
        )
        self.disagreement = self._checked()

    def _checked(self) -> float:
        """The relative difference of the two gradients on a draw of ours; RuntimeError where it is large."""
        policy, pipeline = self.trainer.policy, self.published.pipeline
        batch = self.source.next(policy)
        parameters = list(policy.parameters().values())
        ours = torch.zeros(sum(parameter.numel() for parameter in parameters))
        for part, share in self.objective.split(batch):
            loss, _ = self.objective.loss(policy, part)
            ours += _flat(torch.autograd.grad(loss * share, parameters))
        embeds, pooled = self.published.encode(batch.prompts)
        sample = {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "timesteps": pipeline.scheduler.timesteps.repeat(len(batch), 1),
            "latents": batch.trajectory,
            "log_probs": batch.log_probs,
            "advantages": batch.advantages,
        }
        self.published.learn(sample)
        theirs = _flat([parameter.grad for parameter in self.published.parameters if parameter.grad is not None])
        self.published.optimizer.zero_grad()
        difference = float((ours - theirs).norm() / theirs.norm())
        if difference > TOLERANCE:
            raise RuntimeError(f"the two sides have different gradients, by {difference:.2g} of theirs")
        return difference

    def ours(self) -> None:
        """A step of ours."""
        self.trainer.run_step()

    def theirs(self) -> None:
        """A step of theirs."""
        self.published.step(self.prompts)


def _flat(gradients: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def main(
    prompts: Annotated[int, typer.Option(min=1, help="prompts per step")] = 4,
    group_size: Annotated[int, typer.Option(min=2, help="images per prompt")] = 4,
    num_steps: Annotated[int, typer.Option(min=2, help="sampling steps; all but the last are learned from")] = 10,
    beta: Annotated[float, typer.Option(min=0, help="weight of the KL to the base")] = 0.04,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    warmup: Annotated[int, typer.Option(min=0)] = 1,
    results: Path = measure.RESULTS,
) -> None:
    """Measure and record."""
    images = prompts * group_size
    settings = Settings(
        num_steps=num_steps, num_train_timesteps=num_steps - 1, beta=beta, batch_size=images, group_size=group_size
    )
    sides = Sides(prompts, settings)
    taken = measure.interleave(
        {"ours": measure.timed(sides.ours), "published": measure.timed(sides.theirs)}, repeats=repeats, warmup=warmup
    )
    flops = {"ours": measure.flops_of(sides.ours), "published": measure.flops_of(sides.theirs)}
    measure.write_result(
        f"flow_grpo_step_embedded_cpu{'' if beta else '_no_kl'}",
        what=f"Flow-GRPO, {images} images x {num_steps} sampling steps, guidance {settings.guidance_scale:g}, "
        f"KL weight {beta:g}",
        device="cpu",
        results=results,
        comparisons={
            "step": measure.compare_seconds(taken["ours"], taken["published"]),
            "flops": measure.compare_amounts(flops["ours"], flops["published"], unit="FLOPs", of="other/ours"),
        },
        disagreement=sides.disagreement,
    )


if __name__ == "__main__":
    typer.run(main)

"""OPD, on-policy distillation (DiffusionOPD, arXiv 2605.15055): a teacher corrects the steps that the policy takes.

With μ and μ_T a step's means under the live policy and under the teacher, and σ the standard deviation of its noise,
    L = mean over images and steps of  ‖μ − μ_T‖² / (2σ²),
the divergence of the two steps' Gaussians, whose gradient needs no sampled ratio. The teacher is another checkpoint of
the base's kind, or the base with other adapters, which a reward has trained, with a better prompt, or with guidance:
what these do for it, the policy learns to do without them. Squares are means over latent elements.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone, Cond, Metrics, RolloutBatch
from agsm_rl.objectives.flow_grpo import step_kl
from agsm_rl.objectives.policy_gradient import PolicyGradient, TextsOfPass, rollout_steps
from agsm_rl.policy import Policy


class OPD(PolicyGradient):
    """On-policy distillation on rollouts, whose rewards are only measured.

    Args:
        teacher: A run folder, or exported adapters of the same base, with which the teacher predicts; or another
            checkpoint of the base's kind with the same latents and noise (a hub id, a pipeline folder, a .safetensors
            file, or a builtin), which is loaded beside the base. Null: the base alone.
        prompt_suffix: What the teacher reads after each prompt, such as ", best quality".
        guidance: Guidance scale of the teacher. Null: that of the rollouts, with which the policy draws.
        timestep_fraction: Share f of each image's steps in (0, 1] that is learned from. Published: 1.
    """

    def __init__(
        self,
        *,
        teacher: str | None = None,
        prompt_suffix: str = "",
        guidance: float | None = None,
        timestep_fraction: float = 1.0,
        timesteps: Literal["first", "even"] = "first",
        images_per_pass: int | None = None,
        steps_per_pass: int = 1,
    ) -> None:
        super().__init__(
            timestep_fraction=timestep_fraction,
            timesteps=timesteps,
            images_per_pass=images_per_pass,
            steps_per_pass=steps_per_pass,
        )
        if teacher is None and not prompt_suffix and guidance is None:
            raise UserError(
                "opd: without `teacher`, `prompt_suffix` and `guidance`, the teacher is the base as it is, and nothing "
                "is learned; give one of them, e.g. `prompt_suffix: ', best quality'`, or use `anchor` to stay close "
                "to it"
            )
        self.teacher, self.prompt_suffix, self.guidance = teacher, prompt_suffix, guidance
        self._texts_of_teacher = TextsOfPass()

    def loss(self, policy: Policy, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        """The mean divergence of the batch's steps from the teacher's.

        Metrics: `kl`, that divergence per latent element; `teacher_gap`, mean (μ − μ_T)².
        """
        live = self.live_steps(policy, batch)
        means = self._teacher_means(policy, batch)
        kl = torch.stack([step_kl(mean, other, std) for (mean, std), other in zip(live, means, strict=True)], dim=1)
        gaps = [((mean.detach() - other) ** 2).mean() for (mean, _), other in zip(live, means, strict=True)]
        return kl.mean(), {"kl": kl.detach().mean(), "teacher_gap": torch.stack(gaps).mean()}

    @torch.no_grad()
    def _teacher_means(self, policy: Policy, batch: RolloutBatch) -> list[Tensor]:
        """The teacher's means [B, C, h, w] of the batch's steps."""
        guidance = batch.guidance if self.guidance is None else self.guidance
        predict = policy.base if self.teacher is None else partial(policy.teacher, self.teacher)
        backbone = policy.backbone if self.teacher is None else policy.backbone_of_teacher(self.teacher)
        of = (backbone, batch.prompts, batch.negative_prompt)
        encoded = self._texts_of_teacher.get(of, lambda: self._encoded_for(backbone, batch))
        return [mean for mean, _ in rollout_steps(policy, predict, replace(batch, guidance=guidance), encoded)]

    def _encoded_for(self, backbone: Backbone, batch: RolloutBatch) -> tuple[Cond, Cond]:
        """The prompts [B rows] and the negative prompt [1 row] as the teacher reads them."""
        prompts = [prompt + self.prompt_suffix for prompt in batch.prompts]
        texts = replace(batch, prompts=prompts, cond=None).encode_text(backbone)
        return texts, backbone.encode_negative(batch.negative_prompt)

"""What all flow models share: x_t = (1 − t)·x0 + t·noise, and a denoiser that predicts noise − x0.

The noise level is the flow's own, σ = t: a recipe's range of t is thus a range of σ, unshifted; only the sampler shifts
its schedule.
"""

from typing import Any

from torch import Tensor

from agsm_rl.backbones.flow import FlowSampler, flow_scheduler
from agsm_rl.backbones.frozen_pipeline import FrozenPipeline
from agsm_rl.backbones.parts import check_scheduler
from agsm_rl.training.sizes import Resolution


class FlowPipeline(FrozenPipeline):
    """A frozen pipeline whose denoiser predicts a flow."""

    def _wrap(self, pipeline: Any, resolution: Resolution | None, gradient_checkpointing: bool) -> None:
        super()._wrap(pipeline, resolution, gradient_checkpointing)
        self._num_timesteps = flow_scheduler(self._flow_config(pipeline.scheduler)).config.num_train_timesteps

    def _flow_config(self, scheduler: Any) -> dict[str, Any]:
        """The configuration of the FlowMatchEulerDiscreteScheduler on the pipeline's noise schedule.

        UserError for a scheduler of another kind of diffusion.
        """
        check_scheduler(scheduler, "shift", "FlowMatchEulerDiscreteScheduler")
        return dict(scheduler.config)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 − t)·x0 + t·noise [B, C, h, w]."""
        sigma = t.to(x0)[:, None, None, None]
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The flow from image to noise: noise − x0."""
        return noise - x0

    def sampler(self, num_steps: int) -> FlowSampler:
        """The pipeline's own schedule with its shift."""
        return FlowSampler(
            self._flow_config(self.pipeline.scheduler),
            num_steps,
            self.device,
            image_tokens=self._image_tokens(),
            schedule=self._schedule(num_steps),
        )

    def _schedule(self, num_steps: int) -> dict[str, Any]:
        """Arguments of the scheduler's `set_timesteps` with which the pipeline draws in so many steps.

        Where it has neither `sigmas` nor a `mu` of its own, this is their number alone; a schedule that is shifted by
        the number of patches then gets diffusers' usual `mu` for `_image_tokens`.
        """
        return {"num_inference_steps": num_steps}

    def _image_tokens(self) -> int:
        """The number of patches of an image."""
        _, height, width = self.latent_shape
        return (height // self._patch_size()) * (width // self._patch_size())

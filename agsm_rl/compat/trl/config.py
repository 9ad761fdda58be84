"""The options of TRL 0.11's image trainers, with TRL's names and defaults, which are tested against the package."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from agsm_rl.errors import UserError


@dataclass
class TrainerConfig:
    """Options that both trainers share; not for use by itself.

    `exp_name` defaults to the script's name. docs/from_trl.md covers precision, checkpoints and trackers.
    """

    exp_name: str = Path(sys.argv[0]).stem
    run_name: str = ""
    seed: int = 0
    log_with: Literal["wandb", "tensorboard"] | None = None
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = "trl"
    logdir: str = "logs"
    num_epochs: int = 100
    save_freq: int = 1
    num_checkpoint_limit: int = 5
    mixed_precision: str = "fp16"
    allow_tf32: bool = True
    resume_from: str = ""
    sample_num_steps: int = 50
    sample_eta: float = 1.0
    sample_guidance_scale: float = 5.0
    train_batch_size: int = 1
    train_use_8bit_adam: bool = False
    train_adam_beta1: float = 0.9
    train_adam_beta2: float = 0.999
    train_adam_weight_decay: float = 1e-4
    train_adam_epsilon: float = 1e-8
    train_gradient_accumulation_steps: int = 1
    train_max_grad_norm: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """The options as a flat dictionary; entries of a dictionary option are named `option/entry`."""
        return _flat(asdict(self))


@dataclass
class DDPOConfig(TrainerConfig):
    """Options of `DDPOTrainer`.

    An epoch draws `sample_num_batches_per_epoch` × `sample_batch_size` images per process, then takes one optimiser
    step for every `train_batch_size` × `train_gradient_accumulation_steps` of them. It goes through the images
    `train_num_inner_epochs` times.
    """

    sample_batch_size: int = 1
    sample_num_batches_per_epoch: int = 2
    train_learning_rate: float = 3e-4
    train_num_inner_epochs: int = 1
    train_cfg: bool = True
    train_adv_clip_max: float = 5.0
    train_clip_range: float = 1e-4
    train_timestep_fraction: float = 1.0
    per_prompt_stat_tracking: bool = False
    per_prompt_stat_tracking_buffer_size: int = 16
    per_prompt_stat_tracking_min_count: int = 16
    async_reward_computation: bool = False
    max_workers: int = 2
    negative_prompts: str = ""

    @property
    def num_train_timesteps(self) -> int:
        """How many denoising steps of each image are learned from."""
        return int(self.sample_num_steps * self.train_timestep_fraction)

    def check(self) -> None:
        """UserError for options that contradict each other; called by the trainer."""
        positive = ("sample_num_steps", "sample_batch_size", "sample_num_batches_per_epoch", "train_num_inner_epochs")
        _check_positive(self, (*positive, "train_batch_size", "train_gradient_accumulation_steps", "save_freq"))
        if self.sample_eta <= 0:
            raise UserError(
                f"sample_eta: got {self.sample_eta}, but it must be above 0; without noise there is no policy gradient "
                "(default: 1)"
            )
        if not 0 < self.num_train_timesteps <= self.sample_num_steps:
            raise UserError(
                f"train_timestep_fraction: {self.train_timestep_fraction} of {self.sample_num_steps} steps is "
                f"{self.num_train_timesteps}, but it must be between 1 and {self.sample_num_steps}"
            )
        drawn = self.sample_batch_size * self.sample_num_batches_per_epoch
        learned = self.train_batch_size * self.train_gradient_accumulation_steps
        if drawn % learned:
            raise UserError(
                f"an epoch draws {self.sample_batch_size} x {self.sample_num_batches_per_epoch} = {drawn} images per "
                f"process, which is not a multiple of train_batch_size {self.train_batch_size} x "
                f"train_gradient_accumulation_steps {self.train_gradient_accumulation_steps} = {learned}"
            )


@dataclass
class AlignPropConfig(TrainerConfig):
    """Options of `AlignPropTrainer`, which differentiates rewards through the last sampling steps.

    Sampling step k carries gradients if k is at least `truncated_backprop_timestep` or, with `truncated_backprop_rand`,
    at least a number drawn for each step from `truncated_rand_backprop_minmax` (both ends included).
    """

    log_image_freq: int = 1
    train_learning_rate: float = 1e-3
    negative_prompts: str | None = None
    truncated_backprop_rand: bool = True
    truncated_backprop_timestep: int = 49
    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50)

    def check(self) -> None:
        """UserError for options that contradict each other; called by the trainer."""
        _check_positive(
            self,
            (
                "sample_num_steps",
                "train_batch_size",
                "train_gradient_accumulation_steps",
                "save_freq",
                "log_image_freq",
            ),
        )


def _check_positive(config: TrainerConfig, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name}: got {getattr(config, name)}, but it must be 1 or more")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": item for key, item in _flat(value).items()}
        else:
            flat[name] = value
    return flat

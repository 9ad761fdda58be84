"""The base of TRL's two image trainers: accelerate, the policy, checkpoints, saving, and the loop over epochs."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from huggingface_hub import ModelHubMixin

from agsm_rl.compat.trl.config import TrainerConfig
from agsm_rl.compat.trl.pipeline import DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline
from agsm_rl.errors import UserError
from agsm_rl.files import local_path
from agsm_rl.policy import Objective, Source
from agsm_rl.term import Term
from agsm_rl.trainer import Trainer

log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainerConfig)
RewardFunction = Callable[[torch.Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]]
PromptFunction = Callable[[], tuple[str, Any]]
ImageHook = Callable[[Any, int, Any], Any]
MODEL_CARD = """---
{{ card_data }}
---

A text-to-image model trained on rewards with agsm-rl. The folder holds the pipeline and, if a LoRA was trained,
`pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`. `config.json` holds the options.
"""
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


class NoTracker:
    """The tracker that `image_samples_hook` gets when `log_with` names none: it keeps nothing."""

    name = "none"

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Does nothing."""

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Does nothing."""


class BaseTrainer(
    ModelHubMixin,
    ABC,
    Generic[Config],
    model_card_template=MODEL_CARD,
    library_name="diffusers",
    pipeline_tag="text-to-image",
    tags=["agsm-rl"],
):
    """Draws and learns in epochs. `push_to_hub` comes from huggingface_hub, as in TRL.

    Raises UserError if options contradict each other, or if the folder holds another run's checkpoints.
    """

    def __init__(
        self,
        config: Config,
        reward_function: RewardFunction,
        prompt_function: PromptFunction,
        sd_pipeline: DDPOStableDiffusionPipeline,
        image_samples_hook: ImageHook | None = None,
    ) -> None:
        if not isinstance(sd_pipeline, DefaultDDPOStableDiffusionPipeline):
            raise UserError(
                f"sd_pipeline: got a {type(sd_pipeline).__name__}; pass a DefaultDDPOStableDiffusionPipeline, which "
                "loads any supported pipeline from its name or folder"
            )
        self.config, self.sd_pipeline = config, sd_pipeline
        self.prompt_fn, self.reward_fn, self.image_samples_callback = (
            prompt_function,
            reward_function,
            image_samples_hook,
        )
        folder = _checkpoint_to_resume(config.resume_from) if config.resume_from else None
        self.accelerator = _accelerator(config)
        self._check_room(resuming=folder is not None)
        trackable = (int, float, str, bool)
        self.accelerator.init_trackers(
            config.tracker_project_name,
            config={key: v if isinstance(v, trackable) else str(v) for key, v in config.to_dict().items()},
            init_kwargs=config.tracker_kwargs,
        )
        set_seed(config.seed, device_specific=True)
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        dtype = DTYPES[self.accelerator.mixed_precision]
        self.policy = sd_pipeline.prepare(self.accelerator.device, dtype, seed=config.seed)
        self._trainer = self._make_trainer()
        self.accelerator.register_for_checkpointing(self._trainer)
        self.first_epoch = 0
        if folder is not None:
            self.accelerator.load_state(str(folder))
            self.first_epoch = int(folder.name.rpartition("_")[2]) + 1

    @abstractmethod
    def _term(self) -> tuple[Objective, Source]:
        """The objective, and the source of its batches."""

    @abstractmethod
    def step(self, epoch: int, global_step: int) -> int:
        """Run one epoch; returns the number of optimiser steps so far."""

    def _make_trainer(self) -> Trainer:
        config: Any = self.config
        objective, source = self._term()
        trainer = Trainer(
            self.policy,
            [Term(objective, source, name="trl")],
            steps=0,  # the loop over epochs decides when to stop
            seed=config.seed,
            learning_rate=config.train_learning_rate,
            weight_decay=config.train_adam_weight_decay,
            betas=(config.train_adam_beta1, config.train_adam_beta2),
            max_grad_norm=config.train_max_grad_norm,
            accelerator=self.accelerator,
        )
        if config.train_use_8bit_adam:
            trainer.optimizer = _adam_8bit()(trainer.optimizer.param_groups)
        for group in trainer.optimizer.param_groups:
            group["eps"] = config.train_adam_epsilon
        return trainer

    def train(self, epochs: int | None = None) -> None:
        """Train until epoch `epochs` (default: `config.num_epochs`), starting after the resumed checkpoint's epoch."""
        global_step = 0
        for epoch in range(self.first_epoch, self.config.num_epochs if epochs is None else epochs):
            global_step = self.step(epoch, global_step)
            if epoch and epoch % self.config.save_freq == 0:
                self._save_checkpoint(epoch)

    @property
    def _tracker(self) -> Any:
        return self.accelerator.trackers[0] if self.accelerator.trackers else NoTracker()

    @property
    def _checkpoints(self) -> Path:
        return Path(self.accelerator.project_dir) / "checkpoints"

    def _check_room(self, *, resuming: bool) -> None:
        """UserError if the folder holds another run's checkpoints, which this run would overwrite or mix up."""
        if not resuming and list(self._checkpoints.glob("checkpoint_*")):
            raise UserError(
                f"{self._checkpoints}: holds the checkpoints of another run; resume it with resume_from="
                f"'{self._checkpoints}', or choose another project_kwargs['project_dir'] or logdir"
            )

    def _save_checkpoint(self, epoch: int) -> None:
        self.accelerator.project_configuration.iteration = epoch
        folder = self.accelerator.save_state()
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_lora(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_pretrained(save_directory)


def checked_rewards(rewards: Any, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
    """A reward function's scores as [B], with their gradients; UserError unless each image has one finite score."""
    scores = torch.as_tensor(rewards, device=device)
    scores = scores if scores.is_floating_point() else scores.float()
    if scores.numel() != len(prompts):
        raise UserError(
            f"reward_function: returned scores of shape {tuple(scores.shape)} for {len(prompts)} images; it must "
            "return (scores, metadata) with one score per image"
        )
    scores = scores.reshape(-1)
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).nonzero()[0])
        raise UserError(f"reward_function: its score is {float(scores[bad])} for the prompt '{prompts[bad]}'")
    return scores


def _accelerator(config: TrainerConfig) -> Accelerator:
    """As in TRL; checkpoints and trackers go to `logdir` unless `project_kwargs` names another folder."""
    project = {"project_dir": config.logdir, "total_limit": config.num_checkpoint_limit} | config.project_kwargs
    return Accelerator(
        log_with=config.log_with,
        mixed_precision=_precision(config),
        project_config=ProjectConfiguration(**(project | {"automatic_checkpoint_naming": True})),
        **config.accelerator_kwargs,
    )


def _precision(config: TrainerConfig) -> str:
    """fp16 needs gradient scaling, which our trainer does not do: use bf16 instead, or float32 without its support."""
    if config.mixed_precision in DTYPES:
        return config.mixed_precision
    if config.mixed_precision != "fp16":
        raise UserError(f"mixed_precision: '{config.mixed_precision}' is not supported; allowed: no, bf16, fp16")
    gpu = torch.cuda.is_available() and not config.accelerator_kwargs.get("cpu")
    replacement = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    log.warning("mixed_precision: using '%s' instead of 'fp16', which would need gradient scaling", replacement)
    return replacement


def _checkpoint_to_resume(path: str) -> Path:
    """The checkpoint that `resume_from` names, or the newest one in that folder."""
    folder = local_path(path)
    candidates = [folder] if folder.name.startswith("checkpoint_") else folder.glob("checkpoint_*")
    epochs = {path: path.name.rpartition("_")[2] for path in candidates if path.is_dir()}
    checkpoints = [path for path, epoch in epochs.items() if epoch.isdigit()]
    if not checkpoints:
        raise UserError(
            f"resume_from: there is no checkpoint at {folder}; give a checkpoint_<epoch> folder, or the folder that "
            "holds them"
        )
    return max(checkpoints, key=lambda path: int(epochs[path]))


def _adam_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("train_use_8bit_adam: needs bitsandbytes; run `pip install bitsandbytes`") from error
    return AdamW8bit

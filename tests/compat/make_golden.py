"""Writes golden/trl_0_11_4.json from the real TRL 0.11.4, in an environment of its own:

    pip install "trl==0.11.4" --no-deps     (beside this project's own requirements and `pip install -e .`)
    python tests/compat/make_golden.py

The tests read the file and need no TRL. The base is the embedded `builtin:shapes-sd15`, in float32 on the CPU.
"""

import inspect
import json
import tempfile
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import golden_inputs as inputs
import numpy as np
import torch
import trl
from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from trl.models import modeling_sd_base
from trl.trainer.utils import PerPromptStatTracker

import agsm_rl

BASE = Path(agsm_rl.__file__).parent / "shapes" / "checkpoints" / "shapes-sd15"
OUT = Path(__file__).parent / "golden" / "trl_0_11_4.json"


def defaults(config: type) -> dict[str, Any]:
    """Field → default; `exp_name` is the script's name and left out."""
    found = {}
    for item in fields(config):
        value = item.default if item.default is not MISSING else item.default_factory()
        found[item.name] = list(value) if isinstance(value, tuple) else value
    del found["exp_name"]
    return found


def arguments(function: Any) -> list[str]:
    """Names of a function's arguments."""
    return list(inspect.signature(function).parameters)[1:]


def make_trainer(**options: Any) -> DDPOTrainer:
    """TRL's trainer on the embedded base, its LoRA filled by formula."""
    settings = {"mixed_precision": "no", "sample_num_steps": inputs.NUM_STEPS, "sample_batch_size": 2}
    settings |= {"sample_guidance_scale": inputs.GUIDANCE, "project_kwargs": {"project_dir": tempfile.mkdtemp()}}
    trainer = DDPOTrainer(DDPOConfig(**(settings | options)), None, None, DefaultDDPOStableDiffusionPipeline(str(BASE)))
    inputs.fill_lora(lora(trainer))
    trainer.sd_pipeline.scheduler.set_timesteps(inputs.NUM_STEPS)
    return trainer


def lora(trainer: DDPOTrainer) -> dict[str, torch.nn.Parameter]:
    """The trained matrices by "<layer>.lora_A" and "<layer>.lora_B"."""
    named = trainer.sd_pipeline.unet.named_parameters()
    return {name.removesuffix(".default.weight"): value for name, value in named if value.requires_grad}


def embeds(trainer: DDPOTrainer, prompts: list[str]) -> torch.Tensor:
    """The prompts as TRL encodes them."""
    pipeline = trainer.sd_pipeline
    length = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer(prompts, return_tensors="pt", padding="max_length", truncation=True, max_length=length)
    return pipeline.text_encoder(ids.input_ids)[0]


def sample_of(trainer: DDPOTrainer, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch that TRL learns from, made of a path; its old log-probabilities are a little off."""
    timesteps = trainer.sd_pipeline.scheduler.timesteps.repeat(2, 1)
    sample = {
        "prompt_embeds": embeds(trainer, inputs.PROMPTS).detach(),
        "negative_prompt_embeds": trainer.neg_prompt_embed.detach().repeat(2, 1, 1),
        "timesteps": timesteps,
        "latents": states[:, :-1],
        "next_latents": states[:, 1:],
        "advantages": torch.tensor([0.75, -6.0]),
        "log_probs": torch.zeros(2, inputs.NUM_STEPS),
    }
    for k in range(inputs.NUM_STEPS):
        output = guided_step(trainer, sample, k)
        sample["log_probs"][:, k] = output.detach()
    # Ratios on both sides of the clip range for either sign of the advantage, and far from it by what machines differ
    # in: a log-probability of -1000 is exact to 1e-4 in float32.
    sample["log_probs"] += 0.3 * inputs.normal((2, inputs.NUM_STEPS), "offset")
    return sample


def guided_step(trainer: DDPOTrainer, sample: dict[str, torch.Tensor], k: int) -> torch.Tensor:
    """TRL's log-probability of step k, read out of its `calculate_loss`."""
    found = {}
    step = trainer.sd_pipeline.scheduler_step

    def spy(*args: Any, **kwargs: Any) -> Any:
        found["log_probs"] = (output := step(*args, **kwargs)).log_probs
        return output

    trainer.sd_pipeline.scheduler_step = spy
    loss(trainer, sample, k)
    del trainer.sd_pipeline.scheduler_step
    return found["log_probs"]


def loss(trainer: DDPOTrainer, sample: dict[str, torch.Tensor], k: int) -> tuple[torch.Tensor, ...]:
    """TRL's loss, approximate KL and clipped fraction of step k."""
    text = sample["prompt_embeds"]
    both = torch.cat([sample["negative_prompt_embeds"], text]) if trainer.config.train_cfg else text
    keys = ("latents", "timesteps", "next_latents", "log_probs")
    return trainer.calculate_loss(*(sample[key][:, k] for key in keys), sample["advantages"], both)


def latent_shape(trainer: DDPOTrainer) -> tuple[int, ...]:
    """[C, h, w]."""
    config = trainer.sd_pipeline.unet.config
    return (config.in_channels, config.sample_size, config.sample_size)


def losses(states: torch.Tensor, **options: Any) -> dict[str, Any]:
    """Log-probabilities, losses and gradients of every step."""
    trainer = make_trainer(train_clip_range=inputs.CLIP_RANGE, **options)
    sample = sample_of(trainer, states)
    found: dict[str, Any] = {"old_log_probs": sample["log_probs"].tolist(), "log_probs": [], "steps": []}
    for k in range(inputs.NUM_STEPS):
        found["log_probs"].append(guided_step(trainer, sample, k).tolist())
        value, kl, clipped = loss(trainer, sample, k)
        trainer.sd_pipeline.unet.zero_grad()
        value.backward()
        gradients = {name: parameter.grad for name, parameter in lora(trainer).items()}
        figures = {"loss": float(value), "approx_kl": float(kl), "clipfrac": float(clipped)}
        found["steps"].append(figures | {"gradient": inputs.projections(gradients)})
    return found


def update(states: torch.Tensor) -> dict[str, Any]:
    """One optimiser step over two images, one at a time, accumulated over all denoising steps."""
    trainer = make_trainer(**inputs.UPDATE)
    sample = sample_of(trainer, states)
    before = {name: value.detach().clone() for name, value in lora(trainer).items()}
    logged: list[dict[str, float]] = []
    trainer.accelerator.log = lambda values, step: logged.append({key: float(value) for key, value in values.items()})
    trainer._train_batched_samples(0, 0, 0, [{key: value[i : i + 1] for key, value in sample.items()} for i in (0, 1)])
    moved = {name: value.detach() - before[name] for name, value in lora(trainer).items()}
    return {"old_log_probs": sample["log_probs"].tolist(), "logged": logged, "moved": inputs.projections(moved)}


def sampling(**options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The path [2, NUM_STEPS + 1, C, h, w] of two images drawn by TRL from the formula's noise, and figures of it."""
    trainer = make_trainer(**options)
    shape = (2, *latent_shape(trainer))
    count = iter(range(inputs.NUM_STEPS))
    drawn = modeling_sd_base.randn_tensor
    modeling_sd_base.randn_tensor = lambda size, **_: inputs.normal(tuple(size), f"step {next(count)}")
    try:
        output = trainer.sd_pipeline(
            prompt_embeds=embeds(trainer, inputs.PROMPTS),
            negative_prompt_embeds=trainer.neg_prompt_embed.repeat(2, 1, 1),
            num_inference_steps=inputs.NUM_STEPS,
            guidance_scale=inputs.GUIDANCE,
            eta=1.0,
            latents=inputs.normal(shape, "start"),
            output_type="pt",
        )
    finally:
        modeling_sd_base.randn_tensor = drawn
    states = torch.stack(output.latents, dim=1)
    return states, {
        "timesteps": trainer.sd_pipeline.scheduler.timesteps.tolist(),
        "log_probs": torch.stack(output.log_probs, dim=1).tolist(),
        "latents_norm": states.flatten(2).norm(dim=2).tolist(),
        "last_latents": states[:, -1, :, 0, :4].tolist(),
        "image_mean": output.images.mean(dim=(2, 3)).tolist(),
        "image_corner": output.images[:, :, :2, :2].tolist(),
    }


def advantages() -> dict[str, Any]:
    """By prompt over three epochs, and over all images of each."""
    tracker = PerPromptStatTracker(4, 3)
    pairs = list(zip(inputs.TRACKED_PROMPTS, inputs.REWARDS, strict=True))
    tracked = [tracker.update(prompts, np.array(rewards, dtype=np.float32)).tolist() for prompts, rewards in pairs]
    return {"by_prompt": tracked, "over_all": [globally(rewards) for rewards in inputs.REWARDS]}


def globally(rewards: list[float]) -> list[float]:
    """What TRL's `step` puts into its samples without per-prompt tracking, read when it begins to learn."""
    trainer = make_trainer(sample_batch_size=len(rewards), sample_num_batches_per_epoch=1, train_batch_size=1)
    given = [torch.zeros(1, 3, 1, 1)] * len(rewards)
    count = len(rewards)
    sample = {
        key: torch.zeros(count, inputs.NUM_STEPS) for key in ("timesteps", "latents", "next_latents", "log_probs")
    }
    sample |= {"prompt_ids": torch.zeros(count, 1), "number": torch.arange(count)}
    trainer._generate_samples = lambda **_: ([sample], [[given, ("",) * count, ({},) * count]])
    trainer.reward_fn = lambda images, prompts, metadata: (np.array(rewards, dtype=np.float32), {})
    found: dict[int, float] = {}

    def keep(inner_epoch: int, epoch: int, global_step: int, batches: list[dict[str, torch.Tensor]]) -> int:
        found.update({int(batch["number"]): float(batch["advantages"]) for batch in batches})
        return global_step

    trainer._train_batched_samples = keep
    trainer.step(0, 0)
    return [found[index] for index in range(count)]


def main() -> None:
    assert trl.__version__ == "0.11.4", trl.__version__
    torch.manual_seed(0)
    states, sampled = sampling()
    _, sampled_away = sampling(negative_prompts=inputs.NEGATIVE)
    packed = inputs.pack(states)
    states = inputs.unpack(packed)
    content = {
        "trl": trl.__version__,
        "ddpo_config": defaults(DDPOConfig),
        "alignprop_config": defaults(AlignPropConfig),
        "ddpo_trainer": arguments(DDPOTrainer.__init__),
        "alignprop_trainer": arguments(AlignPropTrainer.__init__),
        "pipeline": arguments(DefaultDDPOStableDiffusionPipeline.__init__),
        "advantages": advantages(),
        "losses": losses(states),
        "losses_with_a_negative_prompt": losses(states, negative_prompts=inputs.NEGATIVE),
        "losses_without_guidance": losses(states, train_cfg=False),
        "update": update(states),
        "sampling": sampled,
        "sampling_with_a_negative_prompt": sampled_away,
        "path": packed,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

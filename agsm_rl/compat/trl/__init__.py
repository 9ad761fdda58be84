"""The image trainers of TRL 0.11, which TRL 0.24 removed. A script written for them runs once its import is changed.

    from agsm_rl.compat.trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
    from agsm_rl.compat.trl import DDPOConfig, DDPOTrainer

Names, options, defaults, callbacks, advantages and losses are those of TRL 0.11.4 (tests/compat compares them with
figures from the real package); docs/from_trl.md lists the differences. From current TRL: `sources.rollouts.Rollouts`
repeats each prompt for a group as its GRPO trainer does (`images_per_prompt`), and its reward functions
`f(prompts, completions, **columns)` work here unchanged (agsm_rl_rewards.trl_style).
"""

from agsm_rl.compat.trl.alignprop import AlignPropTrainer
from agsm_rl.compat.trl.config import AlignPropConfig, DDPOConfig
from agsm_rl.compat.trl.ddpo import DDPOTrainer
from agsm_rl.compat.trl.pipeline import DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline

__all__ = [
    "AlignPropConfig",
    "AlignPropTrainer",
    "DDPOConfig",
    "DDPOStableDiffusionPipeline",
    "DDPOTrainer",
    "DefaultDDPOStableDiffusionPipeline",
]

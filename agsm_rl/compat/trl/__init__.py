"""TRL 0.11's image trainers, which TRL removed in its 0.24: a script written for them runs after changing its import.

    from agsm_rl.compat.trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
    from agsm_rl.compat.trl import DDPOConfig, DDPOTrainer

Names, options, defaults, callbacks, advantages and losses are those of TRL 0.11.4 (tests/compat compares them with
figures of the real package); what differs stands in docs/from_trl.md. Of today's TRL, the order of prompts in which its
GRPO trainer repeats each prompt for a group is what `sources.rollouts.Rollouts` does (`images_per_prompt`), and its
reward functions `f(prompts, completions, **columns)` are rewards here as they are (agsm_rl_rewards.trl_style).
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

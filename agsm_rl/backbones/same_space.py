"""Whether two bases speak of the same thing: latents of one autoencoder, noised in one way, and one kind of prediction.

Only then can one teach the other on noised latents. What reads the prompt may differ, and so may the schedule on which
a flow is sampled: it is the student's own.
"""

from typing import Any

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone

LATENTS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Of a VAE's configuration: how its latents are scaled."""
NOISE = (
    *("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    "rescale_betas_zero_snr",
)
"""Of a scheduler's configuration: what a noised latent is, and what is predicted of it. A flow's has none of the betas,
and shifts the sampler's steps alone."""


def check_same_space(student: Backbone, teacher: Backbone) -> None:
    """UserError, which says what differs, where the teacher's predictions mean nothing to the student."""
    differences = []
    if student.name != teacher.name:
        differences.append(f"it is a {teacher.name}, the run's base a {student.name}")
    elif student.latent_shape != teacher.latent_shape:
        differences.append(f"its latents are {_shape(teacher)}, the base's {_shape(student)}")
    else:
        its, own = teacher.pipeline, student.pipeline
        differences += _unequal("VAE", LATENTS, its.vae.config, own.vae.config)
        differences += _unequal("scheduler", NOISE, its.scheduler.config, own.scheduler.config)
    if differences:
        raise UserError(
            f"it cannot teach this run's base: {'; '.join(differences)}. A teacher must be of the same kind, with the "
            "same latents, noise schedule and kind of prediction, such as a fine-tuned version of the base."
        )


def _shape(backbone: Backbone) -> str:
    return " x ".join(map(str, backbone.latent_shape))


def _unequal(part: str, keys: tuple[str, ...], teacher: Any, student: Any) -> list[str]:
    # Configurations of different classes leave out what is off.
    found = [(key, teacher.get(key) or None, student.get(key) or None) for key in keys]
    return [f"its {part}'s {key} is {its}, the base's {own}" for key, its, own in found if its != own]

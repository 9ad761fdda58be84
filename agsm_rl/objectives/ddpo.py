"""DDPO, denoising diffusion policy optimisation (arXiv 2305.13301): steps are actions, images are rewarded.

    L = mean over images and steps of  max( -A·ρ, -A·clip(ρ, 1 - c, 1 + c) ),
    ρ = exp(log π(x_{k+1} | x_k) - log π_old(x_{k+1} | x_k)),
with π the Gaussian DDIM step with η = 1, log π averaged over latent elements, and A the clipped, normalised reward.
"""

from torch import Tensor

from agsm_rl.interfaces import Metrics, RolloutBatch
from agsm_rl.objectives.policy_gradient import PolicyGradient, clipped_policy_loss, log_probs_of, step_log_prob
from agsm_rl.policy import Policy

__all__ = ["DDPO", "clipped_policy_loss", "step_log_prob"]


class DDPO(PolicyGradient):
    """DDPO on rollouts. Guidance is applied in training as it was in sampling (the rollouts store the scale).

    Args:
        clip_range: c > 0 of PPO's clipped loss: a step is not followed further once its ratio leaves 1 ± c. It is small
            because log-probabilities are means over latent elements. Published: 1e-4.
        timestep_fraction: Share f of each image's steps in (0, 1] that is learned from. Published: 1.
    """

    def loss(self, policy: Policy, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        """The clipped loss over the batch's steps."""
        log_prob = log_probs_of(batch, self.live_steps(policy, batch))
        old = batch.log_probs[:, list(batch.steps)]
        return clipped_policy_loss(log_prob, old, batch.advantages[:, None], clip_range=self.clip_range)

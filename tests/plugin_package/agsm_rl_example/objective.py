"""Fine-tuning on pairs by the absolute instead of the squared error."""

from agsm_rl.interfaces import PairBatch


class AbsoluteError:
    """mean |p(x_t, t, prompt) - v| over a batch of pairs, times `scale`."""

    consumes = PairBatch

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale

    def check(self, batch_size):
        """Any number of pairs will do."""

    def split(self, batch):
        """All at once."""
        return [(batch, 1.0)]

    def loss(self, policy, batch):
        """The error, and the prediction's mean as a metric."""
        backbone, draw, x0 = policy.backbone, policy.draw, batch.latents
        noise, t = draw.noise_like(x0, batch.rows), draw.t(batch.rows, x0.device)
        live = policy.live(backbone.add_noise(x0, noise, t), t, backbone.encode_text(batch.prompts))
        return self.scale * (live - backbone.target(x0, noise, t)).abs().mean(), {"mean": live.detach().mean()}

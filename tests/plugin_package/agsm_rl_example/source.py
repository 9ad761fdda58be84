"""Pairs of a plain red, green or blue image and its colour's name."""

import torch

from agsm_rl.interfaces import PairBatch

COLORS = ("red", "green", "blue")


class PlainColors:
    """Batches of `batch_size` pairs, the three colours in turn."""

    gives = PairBatch

    def __init__(self, batch_size: int = 3) -> None:
        self.batch_size, self.given = batch_size, 0

    def bind(self, name, seed, shard):
        """Nothing to open."""

    def next(self, policy):
        """The next pairs, at the backbone's size."""
        backbone = policy.backbone
        rows = torch.arange(self.given, self.given + self.batch_size)
        self.given += self.batch_size
        size = backbone.resolution
        pixels = torch.eye(3)[rows % 3][:, :, None, None].expand(-1, -1, size, size)
        prompts = [f"a {COLORS[row % 3]} picture" for row in rows.tolist()]
        return PairBatch(rows=rows, prompts=prompts, latents=backbone.encode_images(pixels.to(backbone.device)))

    def metrics(self):
        """The number of pairs given so far."""
        return {"given": float(self.given)}

    def state_dict(self):
        """How many pairs have been given."""
        return {"given": self.given}

    def load_state_dict(self, state):
        """Go on from there."""
        self.given = state["given"]

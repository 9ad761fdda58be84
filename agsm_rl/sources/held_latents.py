"""Latents of images that a run has encoded before, held in memory: later epochs neither read nor encode them again.

They are what encoding them again would give, so that a run that is resumed, and begins with none, goes the same way.
"""

from collections.abc import Sequence

from torch import Tensor

from agsm_rl.interfaces import Backbone

IN_MEMORY = 256 * 2**20
"""Bytes that are held at most; the first that came stay, because epochs come in ever new orders."""

Place = tuple[int, str]
"""A row's number, and the column of its image."""


class HeldLatents:
    """Latents [C, h, w] on the CPU by the place of their image, of one backbone at a time."""

    def __init__(self) -> None:
        self._backbone: Backbone | None = None
        self._held: dict[Place, Tensor] = {}
        self._bytes = 0

    def open(self, backbone: Backbone) -> None:
        """Forget what another backbone encoded."""
        if backbone is not self._backbone:
            self._backbone, self._held, self._bytes = backbone, {}, 0

    def get(self, place: Place) -> Tensor | None:
        """The latents of the image at a place, if they are held."""
        return self._held.get(place)

    def hold(self, places: Sequence[Place], latents: Tensor) -> None:
        """Hold the latents [B, C, h, w] of the images at these places, as long as there is room."""
        new = [row for row, place in enumerate(places) if place not in self._held]
        if not new or latents.device.type == "meta" or self._bytes >= IN_MEMORY:
            return
        for row, one in zip(new, latents[new].detach().cpu(), strict=True):
            self._held[places[row]] = one.clone()
            self._bytes += one.numel() * one.element_size()

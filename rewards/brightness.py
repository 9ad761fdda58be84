"""How bright an image is: the simplest reward with gradients, good for trying out reward backpropagation."""

from torch import Tensor


class Brightness:
    """How bright an image is, whatever the prompt: the mean of all its pixels, [B] in [0, 1]."""

    name = "brightness"
    range = (0.0, 1.0)
    licence = "Apache-2.0 (no weights)"
    differentiable = True

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        return images.mean(dim=(1, 2, 3))

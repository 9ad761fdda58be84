"""How bright an image is: the simplest reward with gradients, to try reward backpropagation on."""

from torch import Tensor


class Brightness:
    """The mean of all pixels, [B] in [0, 1], of images [B, 3, H, W] in [0, 1]; the prompts do not matter."""

    name = "brightness"
    range = (0.0, 1.0)
    licence = "Apache-2.0 (no weights)"
    differentiable = True

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

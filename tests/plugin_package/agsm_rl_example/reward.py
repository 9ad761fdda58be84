"""How red an image is."""


class Redness:
    """Red minus the mean of green and blue, [B] in [-1, 1], of images [B, 3, H, W] in [0, 1]."""

    name = "redness"
    range = (-1.0, 1.0)
    differentiable = True

    def __call__(self, images, prompts):
        red, green, blue = images.mean(dim=(2, 3)).unbind(1)
        return red - (green + blue) / 2

"""What published files of tokens and kohya's LoRA are for: they name no base, but their text has its width.

AGSM and SoftREPA were published for these three. Our own exports name their base.
"""

BASE_OF_WIDTH = {768: "SD1.5", 2048: "SDXL", 1536: "SD3"}
BACKBONES = {"SD1.5": "stable_diffusion", "SDXL": "stable_diffusion_xl", "SD3": "stable_diffusion_3"}
"""The name of the backbone of each."""

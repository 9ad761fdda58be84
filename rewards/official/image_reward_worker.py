# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "image-reward==1.5",
#     "clip-anytorch==2.6.0",
#     "diffusers==0.33.1",
#     "numpy",
#     "pillow",
#     "setuptools<81",
#     "timm==0.6.13",
#     "torch==2.13.0",
#     "torchvision==0.28.0",
#     "transformers==4.51.3",
# ]
# ///
"""The package image-reward 1.5 as a worker: `ImageReward.score`, one picture at a time as the package does it.

clip-anytorch is OpenAI's `clip`, which the package imports without requiring it; diffusers is needed by a trainer that
the package imports every time.
"""

from pickle import UnpicklingError

import torch
from agsm_rl_worker import serve
from official_setup import define_torchvision_operators, found_or_fetched, wrong_weights

define_torchvision_operators()

from ImageReward.ImageReward import ImageReward  # noqa: E402
from ImageReward.models.BLIP import blip_pretrain  # noqa: E402
from transformers import BertTokenizer  # noqa: E402


class OfficialImageReward:
    """ImageReward by its own code: the standardised reward, roughly normal over real prompts."""

    images = "pil"
    packages = ("image-reward", "transformers", "timm", "torch")

    def __init__(self, *, path: str, config: str, tokenizer: str) -> None:
        weights, config = found_or_fetched(path, "ImageReward.pt"), found_or_fetched(config, "med_config.json")
        self.vocabulary = found_or_fetched(tokenizer, "vocab.txt")
        blip_pretrain.init_tokenizer = self.make_tokenizer
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = self.build(config, device)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except (RuntimeError, UnpicklingError) as error:
            raise wrong_weights(weights, "ImageReward", error) from error
        # position_ids is a computed buffer that newer checkpoints lack; any other difference means the wrong file.
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        odd = [key for key in [*missing, *unexpected] if not key.endswith("position_ids")]
        if odd:
            raise wrong_weights(weights, "ImageReward", f"{len(odd)} keys differ, first {odd[0]}")
        self.model.to(device).eval()

    def make_tokenizer(self):
        """The package's init_tokenizer, from local files."""
        tokenizer = BertTokenizer(self.vocabulary)
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        return tokenizer

    def build(self, config: str, device: str) -> torch.nn.Module:
        """The model without its weights."""
        return ImageReward(med_config=config, device=device)

    @torch.no_grad()
    def __call__(self, images, prompts):
        return [self.model.score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]


if __name__ == "__main__":
    serve(OfficialImageReward)

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
"""The package image-reward 1.5 as a worker: `ImageReward.score`, a picture at a time as it does.

clip-anytorch is OpenAI's `clip`, which the package imports without requiring it; diffusers is for a trainer of its own
that comes along with every import.
"""

import importlib.util
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from agsm_rl_worker import Refused, serve

# Where torchvision's operators cannot be loaded (its CUDA build beside a CPU build of torch), its import wants these
# two; where they can, a second definition would end the process.
torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
try:
    torch.ops.load_library(next(Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*")))
except OSError:
    torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from ImageReward.ImageReward import ImageReward  # noqa: E402
from ImageReward.models.BLIP import blip_pretrain  # noqa: E402
from transformers import BertTokenizer  # noqa: E402


class OfficialImageReward:
    """ImageReward by its own code: the standardised reward, about normal over people's prompts."""

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
            raise Refused(f"{weights}: not ImageReward's weights: {' '.join(str(error).split())[:300]}") from error
        # A buffer that is computed, and that newer checkpoints lack; any other difference is the wrong file.
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        odd = [key for key in [*missing, *unexpected] if not key.endswith("position_ids")]
        if odd:
            raise Refused(f"{weights}: not ImageReward's weights: {len(odd)} keys differ, first {odd[0]}")
        self.model.to(device).eval()

    def make_tokenizer(self):
        """The package's init_tokenizer, from files that are here."""
        made = BertTokenizer(self.vocabulary)
        made.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        return made

    def build(self, config: str, device: str) -> torch.nn.Module:
        """The model without its weights."""
        return ImageReward(med_config=config, device=device)

    @torch.no_grad()
    def __call__(self, images, prompts):
        return [self.model.score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]


def found_or_fetched(place: str, file: str) -> str:
    """The path of a file that is `place`, lies in that folder, or is fetched from that repository of the hub."""
    if os.path.isfile(place):
        return place
    if os.path.isdir(place):
        if os.path.isfile(os.path.join(place, file)):
            return os.path.join(place, file)
        raise Refused(f"there is no {file} in the folder {place}")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(place, file)
    except Exception as error:
        raise Refused(
            f"{file} of {place} is not on this machine and could not be fetched ({type(error).__name__}); "
            f"fetch it by `hf download {place} {file}`, or say where it lies"
        ) from error


if __name__ == "__main__":
    serve(OfficialImageReward)

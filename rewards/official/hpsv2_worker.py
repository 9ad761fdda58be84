# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "hpsv2==1.2.0",
#     "clint==0.5.1",
#     "numpy",
#     "open-clip-torch==3.3.0",
#     "pillow",
#     "protobuf==3.20.3",
#     "setuptools<81",
#     "torch==2.13.0",
#     "torchvision==0.28.0",
#     "transformers<5",
# ]
# ///
"""The package hpsv2 1.2.0 as a worker: its model, its transform, its tokenizer; the checkpoint is loaded once.

The package imports clint without requiring it; open-clip-torch provides the vocabulary that hpsv2's wheel lacks.
"""

import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path
from pickle import UnpicklingError

import torch
from agsm_rl_worker import serve
from official_setup import define_torchvision_operators, found_or_fetched, wrong_weights

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}

define_torchvision_operators()

# The package imports these two names by accident (an editor's completion) and uses neither.
for module, name in {"turtle": "forward", "curses": "meta"}.items():
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, None)

# The tokenizer opens this file on import. The environment is ours alone, so the file can be put there.
vocabulary = "bpe_simple_vocab_16e6.txt.gz"
here, there = (Path(importlib.util.find_spec(name).origin).parent for name in ("open_clip", "hpsv2"))
if not (there / "src/open_clip" / vocabulary).exists():
    aside = there / f"{vocabulary}.{os.getpid()}"
    shutil.copyfile(here / vocabulary, aside)
    aside.replace(there / "src/open_clip" / vocabulary)

from hpsv2.src import open_clip  # noqa: E402


class OfficialHPSv2:
    """Cosine of image and prompt by HPSv2's own code; the version selects one of the two checkpoints."""

    images = "pil"
    range = (-1.0, 1.0)
    packages = ("hpsv2", "open-clip-torch", "torch")
    architecture = "ViT-H-14"

    def __init__(self, *, version: str, path: str) -> None:
        file = found_or_fetched(path, FILES[version])  # before the model, which is slow to build
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # As the package's img_score.initialize_model does, without the arguments that equal its defaults.
        self.model, _, self.transform = open_clip.create_model_and_transforms(
            self.architecture, precision="amp", device=self.device, light_augmentation=True, output_dict=True
        )
        try:
            self.model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
        except (KeyError, RuntimeError, UnpicklingError) as error:
            raise wrong_weights(file, "HPSv2", error) from error
        self.model.eval()
        self.tokenize = open_clip.get_tokenizer(self.architecture)

    @torch.no_grad()
    def __call__(self, images, prompts):
        pixels = torch.stack([self.transform(image) for image in images]).to(self.device)
        with torch.autocast("cuda", enabled=self.device == "cuda"):
            features = self.model(pixels, self.tokenize(prompts).to(self.device))
        return (features["image_features"] * features["text_features"]).sum(-1).float().cpu()


if __name__ == "__main__":
    serve(OfficialHPSv2)

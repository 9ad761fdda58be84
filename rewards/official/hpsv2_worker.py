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

clint is imported by it, but not required; open-clip-torch is here for the vocabulary that its wheel lacks.
"""

import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path
from pickle import UnpicklingError

import torch
from agsm_rl_worker import Refused, serve

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}

# Where torchvision's operators cannot be loaded (its CUDA build beside a CPU build of torch), its import wants these
# two; where they can, a second definition would end the process.
torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
try:
    torch.ops.load_library(next(Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*")))
except OSError:
    torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# Two imports that an editor's completion left in the package; neither name is used.
for module, name in {"turtle": "forward", "curses": "meta"}.items():
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, None)

# The tokenizer opens this file as it is imported. The environment is ours alone, so the file can be put there.
vocabulary = "bpe_simple_vocab_16e6.txt.gz"
here, there = (Path(importlib.util.find_spec(name).origin).parent for name in ("open_clip", "hpsv2"))
if not (there / "src/open_clip" / vocabulary).exists():
    aside = there / f"{vocabulary}.{os.getpid()}"
    shutil.copyfile(here / vocabulary, aside)
    aside.replace(there / "src/open_clip" / vocabulary)

from hpsv2.src import open_clip  # noqa: E402


class OfficialHPSv2:
    """Cosine of image and prompt by HPSv2's own code; the version says which of the two checkpoints it is."""

    images = "pil"
    range = (-1.0, 1.0)
    packages = ("hpsv2", "open-clip-torch", "torch")
    architecture = "ViT-H-14"

    def __init__(self, *, version: str, path: str) -> None:
        file = found_or_fetched(path, FILES[version])  # before the model, which takes its time
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # As img_score.initialize_model of the package does, less the settings that are its defaults.
        self.model, _, self.transform = open_clip.create_model_and_transforms(
            self.architecture, precision="amp", device=self.device, light_augmentation=True, output_dict=True
        )
        try:
            self.model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
        except (KeyError, RuntimeError, UnpicklingError) as error:
            raise Refused(f"{file}: not HPSv2's weights: {' '.join(str(error).split())[:300]}") from error
        self.model.eval()
        self.tokenize = open_clip.get_tokenizer(self.architecture)

    @torch.no_grad()
    def __call__(self, images, prompts):
        pixels = torch.stack([self.transform(image) for image in images]).to(self.device)
        with torch.autocast("cuda", enabled=self.device == "cuda"):
            found = self.model(pixels, self.tokenize(prompts).to(self.device))
        return (found["image_features"] * found["text_features"]).sum(-1).float().cpu()


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
    serve(OfficialHPSv2)

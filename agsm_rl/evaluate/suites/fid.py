"""Fréchet Inception distance (arXiv 1706.08500) to a folder of real images: torchmetrics on torch-fidelity's network.

The Inception network is the original one as converted by torch-fidelity, and images are resized as in the original.
FID is biased by the number of images (the fewer, the larger): compare only at the same number and against the same
reference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from agsm_rl.errors import UserError
from agsm_rl.evaluate.figures import plain_table
from agsm_rl.evaluate.image_folder import Drawn, is_image_folder, open_picture, pictures_in, read_images
from agsm_rl.evaluate.progress import progress
from agsm_rl.files import check_not_special
from agsm_rl.run.screen import styled

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
FEATURES = 2048
SMALLEST = 2
"""A covariance needs two images."""


@dataclass(frozen=True)
class FIDResult:
    """The distance of `num_images` images to the `num_reference` images of a folder, measured with a network."""

    distance: float
    num_images: int
    reference: str
    num_reference: int
    network: str

    def to_json(self) -> dict[str, Any]:
        """The content of eval.json; smaller is better, and there are no tags."""
        return {
            "suite": "fid",
            "num_images": self.num_images,
            "overall": self.distance,
            "tags": {},
            "reference": self.reference,
            "num_reference": self.num_reference,
            "network": self.network,
        }

    def show(self, console: Console, other: FIDResult | None = None) -> None:
        """Print the distance; with `other`, both targets' and the difference."""
        columns = ("other", "this", "difference") if other else ("FID",)
        table = plain_table("Fréchet Inception distance, smaller is better", ("reference", "n", *columns))
        cells = [f"{self.distance:.3f}"]
        if other:
            cells = [f"{other.distance:.3f}", *cells, f"{self.against(other)['difference']['overall']['value']:+.3f}"]
        table.add_row(styled(f"{Path(self.reference).name} ({self.num_reference})"), str(self.num_images), *cells)
        console.print(table)

    def against(self, other: FIDResult) -> dict[str, Any]:
        """This target minus the other; UserError for different numbers of images, which FID's bias depends on."""
        if self.num_images != other.num_images:
            raise UserError(
                f"FID of {self.num_images} images cannot be compared with FID of {other.num_images}, because FID "
                "depends on the number of images; use the same number for both."
            )
        return {"difference": {"overall": {"value": self.distance - other.distance, "low": None, "high": None}}}


class FID:
    """The suite.

    Args:
        reference: A folder of real images, including subfolders, or a folder in GenEval's layout.
        prompts: Metadata of the prompts by number.
        weights: The Inception network's file; by default the one in torch.hub's cache.
        network: Another feature extractor, uint8 [B, 3, H, W] → [B, D], to use instead of Inception. The figure is then
            not FID, and is labelled with the network's name.
        batch_size: Images per batch.
    """

    name = "fid"

    def __init__(
        self,
        reference: Path,
        prompts: Mapping[int, Mapping[str, Any]],
        *,
        weights: Path | None = None,
        network: nn.Module | None = None,
        batch_size: int = 32,
    ) -> None:
        self.reference, self.prompts, self.num_images = reference, prompts, len(prompts)
        self.network, self.batch_size = network, batch_size
        self.weights = weights or _hub_file()
        self._metric: Any = None
        self._real: list[Path] = []

    def asked(self) -> Mapping[int, Mapping[str, Any]]:
        """The prompts; UserError if there are none."""
        if not self.prompts:
            raise UserError("--suite fid: no prompts to draw; give the reference's captions with --prompts.")
        return self.prompts

    def prepare(self) -> None:
        """Find the reference's images and load the network."""
        self._real = _reference_images(self.reference)
        self._metric = self._metric or self._make_metric()

    def check(self, images: Sequence[Drawn]) -> None:
        """Accepts any image."""

    def pending(self, images: Sequence[Drawn]) -> list[Drawn]:
        """None, because the distance is over all images together."""
        return []

    def measure(self, images: Sequence[Drawn]) -> None:
        """Does nothing: single images are not measured."""

    def result(self, images: Sequence[Drawn]) -> FIDResult:
        """The distance of these images to the reference."""
        if len(images) < SMALLEST:
            raise UserError(
                f"--suite fid: got {len(images)} images, but a covariance needs {SMALLEST}; draw some thousands."
            )
        self.prepare()
        if self._metric.real_features_num_samples == 0:
            self._update(self._real, real=True)
        self._update([item.path for item in images], real=False)
        distance = float(self._metric.compute())
        self._metric.reset()
        network = "Inception v3 (torch-fidelity)" if self.network is None else type(self.network).__name__
        return FIDResult(distance, len(images), str(self.reference), len(self._real), network)

    def _update(self, paths: Sequence[Path], *, real: bool) -> None:
        what = "reference" if real else "images"
        with progress(f"features of the {what}", total=len(paths)) as advance:
            for part in _batches(paths, self.batch_size):
                self._metric.update(part.to(self._metric.device), real=real)
                advance(len(part))

    def _make_metric(self) -> Any:
        if find_spec("torchmetrics") is None:
            raise _not_installed("torchmetrics")
        if self.network is None:
            if find_spec("torch_fidelity") is None or find_spec("torchvision") is None:
                raise _not_installed("torch-fidelity")
            _check_weights(self.weights)
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            options: dict[str, Any] = {"feature": self.network or FEATURES, "reset_real_features": False}
            if self.network is None:
                # The original resizes without antialiasing, and published figures follow it.
                options |= {"feature_extractor_weights_path": str(self.weights), "antialias": False}
            metric = FrechetInceptionDistance(**options)
        except (ImportError, RuntimeError) as error:
            raise UserError(f"--suite fid: the Inception network cannot be constructed ({error}).") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return metric.to(device)


def _check_weights(weights: Path) -> None:
    """UserError unless the file exists and holds only tensors: torch-fidelity would unpickle anything."""
    check_not_special(weights)
    if not weights.is_file():
        raise UserError(
            f"--suite fid: the Inception weights {weights} are missing; download them with `curl -L --create-dirs -o "
            f"{weights} {URL}`, or give --inception FILE."
        )
    try:
        torch.load(weights, map_location="meta", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{weights}: is not a file of Inception weights ({error}); download them again from {URL}."
        ) from error


def _not_installed(package: str) -> UserError:
    return UserError(
        f"--suite fid: {package} is not installed; run `pip install 'agsm-rl[fid]'`. torch-fidelity brings "
        "torchvision, which must match the installed torch (CPU or CUDA): give pip the index that torch came from, "
        "or evaluate in a separate environment."
    )


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def _reference_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--reference {folder}: there is no such folder; give a folder of real images.")
    if is_image_folder(folder):
        paths = [item.path for item in read_images(folder)]
    else:
        paths = [path for place, _, _ in os.walk(folder) for path in pictures_in(Path(place))]
    if len(paths) < SMALLEST:
        raise UserError(f"--reference {folder}: has {len(paths)} images; give a folder with some thousands.")
    return sorted(paths)


def _batches(paths: Sequence[Path], size: int) -> Any:
    """Batches uint8 [B, 3, H, W]; a change of size starts a new batch."""
    part: list[Tensor] = []
    for path in paths:
        image = torch.from_numpy(np.array(open_picture(path))).permute(2, 0, 1)
        if part and (len(part) == size or image.shape != part[0].shape):
            yield torch.stack(part)
            part = []
        part.append(image)
    if part:
        yield torch.stack(part)

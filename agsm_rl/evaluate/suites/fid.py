"""Fréchet Inception distance (arXiv 1706.08500) to a folder of real images: torchmetrics on torch-fidelity's network.

The Inception network is the original one as converted by torch-fidelity, and images are resized as in the original.
FID is biased by the number of images (the fewer, the larger): compare only at the same number and against the same
reference.
"""

from __future__ import annotations

import base64
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from rich.console import Console
from torch import Tensor, nn

from agsm_rl.errors import UserError
from agsm_rl.evaluate.figures import plain_table
from agsm_rl.evaluate.image_folder import is_image_folder, open_picture, pictures_in, read_images
from agsm_rl.evaluate.intervals import Interval
from agsm_rl.evaluate.progress import progress
from agsm_rl.evaluate.prompts import PromptList
from agsm_rl.evaluate.suite import Judged, Metadata, Row, Suite, batches_of_one_size
from agsm_rl.files import check_not_special, local_path
from agsm_rl.recipe.options import NumImages
from agsm_rl.run.screen import styled

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
FEATURES = 2048
SMALLEST, BATCH = 2, 32
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
            "images": [],
            "reference": self.reference,
            "num_reference": self.num_reference,
            "network": self.network,
        }

    def scores(self) -> dict[str, Interval]:
        """`fid`, without an interval."""
        return {"fid": Interval(self.distance, math.nan, math.nan)}

    def per_image(self) -> dict[str, list[float]]:
        """None: the distance is over all images together."""
        return {}

    def show(
        self, console: Console, other: FIDResult | None = None, *, labels: tuple[str, str] = ("other", "this")
    ) -> None:
        """Print the distance; with `other`, both targets' and the difference."""
        columns = (*labels, "difference") if other else ("FID",)
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


class FID(Suite):
    """How far the images' distribution is from that of a folder of real ones, in an Inception network's features.

    Args:
        reference: A folder of real images, including subfolders, or a folder in GenEval's layout.
        prompts: The prompts to draw, usually the reference's captions: a text file, a table (.jsonl, .csv, …), a
            `datasets` name or `builtin:shapes-prompts`.
        prompt_column: The column that holds the prompts.
        prompt_split: The data set's split; of a list `builtin:…-prompts`, by default the evaluation's.
        num_images: How many images to draw. Null: one of each prompt.
        inception: The Inception network's file. Null: the one in torch.hub's cache.
    """

    name = "fid"
    folder = "inception"
    network: nn.Module | None = None
    """Another feature extractor, uint8 [B, 3, H, W] → [B, D]. The figure is then labelled with its name."""
    smaller_is_better = frozenset({"fid"})
    needs_prompts = False
    only_draws = frozenset({"seed", "prompts", "prompt_column", "prompt_split"})

    def __init__(
        self,
        *,
        reference: str,
        prompts: str | None = None,
        prompt_column: str | None = None,
        prompt_split: str | None = None,
        num_images: NumImages | None = None,
        inception: str | None = None,
    ) -> None:
        self.reference = local_path(reference)
        self.list = PromptList(prompts, prompt_column, prompt_split, num_images)
        self.weights = local_path(inception) if inception else _hub_file()
        self._metric: Any = None
        self._real: list[Path] = []

    @property
    def num_images(self) -> int:  # type: ignore[override]
        """The number given, or one image of each prompt."""
        return self.list.num_images

    def score_names(self) -> Sequence[str]:
        """`fid`."""
        return ("fid",)

    def prompts(self) -> Mapping[int, Metadata]:
        """The prompts; UserError if there are none."""
        if self.list.prompts is None:
            raise UserError("suite fid: no prompts to draw; give the reference's captions as `prompts` (--prompts).")
        return self.list.read()

    def how(self) -> Mapping[str, Any]:
        """The network."""
        return {"network": self._network_name(), "weights": None if self.network else self.weights.name}

    def prepare(self) -> None:
        """Find the reference's images and load the network."""
        self._real = self._real or _reference_images(self.reference)
        self._metric = self._metric or self._make_metric()

    def judge(self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Row]:
        """The network's features of each picture: float32 values, little-endian, as base64."""
        self.prepare()
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in self._features(images)]

    def result(self, judged: Sequence[Judged]) -> FIDResult:
        """The distance of these images to the reference."""
        if len(judged) < SMALLEST:
            raise UserError(
                f"suite fid: got {len(judged)} images, but a covariance needs {SMALLEST}; draw some thousands."
            )
        self.prepare()
        if self._metric.real_features_num_samples == 0:
            with progress("features of the reference", total=len(self._real)) as advance:
                for start in range(0, len(self._real), BATCH):
                    part = [open_picture(path) for path in self._real[start : start + BATCH]]
                    self._add("real", self._features(part))
                    advance(len(part))
        self._add("fake", np.stack([np.frombuffer(base64.b64decode(item.row), "<f4") for item in judged]))
        with warnings.catch_warnings():  # torchmetrics warns because its own `update` was not called
            warnings.simplefilter("ignore", UserWarning)
            distance = float(self._metric.compute())
        self._metric.reset()
        return FIDResult(distance, len(judged), str(self.reference), len(self._real), self._network_name())

    def _network_name(self) -> str:
        return "Inception v3 (torch-fidelity)" if self.network is None else type(self.network).__name__

    def _features(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """[N, D], in the images' order; images of one size go through the network together."""
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        rows: list[Tensor] = [torch.empty(0)] * len(tensors)
        for part in batches_of_one_size([tuple(tensor.shape) for tensor in tensors], BATCH):
            with torch.no_grad():
                features = self._metric.inception(torch.stack([tensors[index] for index in part]).to(self._device))
            for index, row in zip(part, features.float().cpu(), strict=True):
                rows[index] = row
        return np.asarray(torch.stack(rows).numpy())

    @property
    def _device(self) -> Any:
        return self._metric.device

    def _add(self, which: Literal["real", "fake"], features: NDArray[np.float32]) -> None:
        """Add rows of features to the sums that torchmetrics' own `update` keeps."""
        values = torch.from_numpy(features).double().to(self._device)
        self._metric.orig_dtype = torch.float32  # of the features, for the figure's own type
        sums = {"sum": values.sum(dim=0), "cov_sum": values.t().mm(values), "num_samples": len(values)}
        for name, value in sums.items():
            key = f"{which}_features_{name}"
            setattr(self._metric, key, getattr(self._metric, key) + value)

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
            raise UserError(f"suite fid: the Inception network cannot be constructed ({error}).") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return metric.to(device)


def _check_weights(weights: Path) -> None:
    """UserError unless the file exists and holds only tensors: torch-fidelity would unpickle anything."""
    check_not_special(weights)
    if not weights.is_file():
        raise UserError(
            f"suite fid: the Inception weights {weights} are missing; download them with `curl -L --create-dirs -o "
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
        f"suite fid: {package} is not installed; run `pip install 'agsm-rl[fid]'`. torch-fidelity brings "
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

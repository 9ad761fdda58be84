"""Finding a reward's weight files and loading all of each: a missing or unused tensor is an error that names it.

Files are safetensors, or PyTorch's read with `weights_only`: nothing in them is ever executed.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from agsm_rl.errors import UserError
from agsm_rl.files import local_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
Place = Callable[[str], tuple[str, Callable[[Tensor], Tensor]]]
"""A tensor's name in our network → its name in the file, and the conversion from the file's tensor to ours."""


@dataclass(frozen=True)
class WeightFile:
    """A file that a reward needs.

    `place` is the value of the reward's `option`: the file itself, a folder that contains it, or a hub id (`owner/name`
    or `owner/name@revision`). `other_source`, for messages, names another place to get the file.
    """

    reward: str
    option: str
    place: str
    name: str
    other_source: str = ""

    def check(self) -> None:
        """UserError if it is certain, without any network, that the file cannot be had."""
        from huggingface_hub import constants

        if self._local() is None and constants.HF_HUB_OFFLINE:
            self.find()

    def find(self) -> Path:
        """The file on this machine, downloaded from the hub if necessary; UserError that says how to get it."""
        return self._local() or self._download()

    def _local(self) -> Path | None:
        """The local file; None for a hub id; UserError for neither."""
        path = local_path(self.place)
        if path.is_file():
            return path
        if path.is_dir():
            if (path / self.name).is_file():
                return path / self.name
            raise self._missing(f"there is no {self.name} in the folder {self.place}")
        if HUB_ID.fullmatch(self.place):
            return None
        raise self._missing(f"{self.place} does not exist (current folder: {Path.cwd()}) and is not a hub id")

    def _download(self) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HTTPError, XetDownloadError

        repo, _, revision = self.place.partition("@")
        try:
            return Path(hf_hub_download(repo, self.name, revision=revision or None))
        except (OSError, ValueError, EntryNotFoundError, HTTPError, XetDownloadError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise self._missing(
                f"{self.name} of {self.place} is not on this machine and could not be downloaded ({reason})"
            ) from error

    def _missing(self, what: str) -> UserError:
        repo, _, revision = self.place.partition("@")
        hub = repo if HUB_ID.fullmatch(self.place) and not Path(repo).exists() else ""
        command = f"hf download {hub} {self.name}" + (f" --revision {revision}" if revision else "")
        advice = [f"download it with `{command}`"] if hub else []
        advice += [self.other_source] if self.other_source else []
        advice += [f"set `{self.option}` to the file, a folder that contains it, or a hub id"]
        return UserError(f"reward '{self.reward}': {what}. What to do: {'; or '.join(advice)}.")


def read_tensors(file: Path, *, reward: str, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU; `inside` names the entry that may hold them.

    Raises UserError for a file that is truncated, or that contains anything but plain data.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise UserError(
            f"reward '{reward}': {file} cannot be read as tensors only: it is truncated, or it contains code, which "
            "is never executed; download the official file again"
        ) from error
    except Exception as error:  # each format raises different errors for a damaged file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"reward '{reward}': {file} cannot be read and may be truncated: {reason}") from error
    if inside is not None and isinstance(content, dict) and inside in content:
        content = content[inside]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        under = f" under '{inside}'" if inside else ""
        raise UserError(f"reward '{reward}': {file} does not contain a table of named tensors{under}")
    return content


def load_whole(
    network: nn.Module, tensors: Mapping[str, Tensor], place: Place, *, unused: str, reward: str, file: Path
) -> None:
    """Fill every tensor of `network` from a file's, and use every tensor of the file.

    `unused`: a pattern of further names that the file may have and the network does not need.
    Raises UserError that names what is missing, left over or of another shape, in the file's names.
    """
    filled, used, missing, misshapen = {}, set(), [], []
    for key, current in network.state_dict().items():
        name, take = place(key)
        used.add(name)
        if name not in tensors:
            missing.append(name)
            continue
        filled[key] = take(tensors[name])
        if filled[key].shape != current.shape:
            misshapen.append(f"{name} {tuple(tensors[name].shape)}")
    extra = [name for name in tensors if name not in used and not re.fullmatch(unused, name)]
    faults = {"missing": missing, "unknown": extra, "of another shape": misshapen}
    if any(faults.values()):
        listed = "; ".join(_listed(fault, names) for fault, names in faults.items() if names)
        raise UserError(
            f"reward '{reward}': the tensors of {file} do not match this model, so nothing was loaded: {listed}. "
            "Is it the right file, and complete?"
        )
    network.load_state_dict(filled)


def _listed(fault: str, names: list[str]) -> str:
    """The first names, each of the file's tensors once: several of ours may come from one."""
    different = list(dict.fromkeys(names))
    return f"{len(different)} {fault}: {', '.join(different[:3])}" + (", …" if len(different) > 3 else "")


def same_name(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The conversion for files that name their tensors as the network does."""
    return key, unchanged


def unchanged(tensor: Tensor) -> Tensor:
    """The file's tensor itself."""
    return tensor

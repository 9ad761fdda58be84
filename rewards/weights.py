"""Where a reward's weight files are, and loading them whole: a file or a model that is incomplete is an error by name.

Files are safetensors, or PyTorch's with `weights_only`: nothing in them is ever run.
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

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
Place = Callable[[str], tuple[str, Callable[[Tensor], Tensor]]]
"""A tensor's name in our network → its name in the file, and what makes ours of the file's."""


@dataclass(frozen=True)
class WeightFile:
    """A file that a reward needs.

    `place` is what the user gave as `option`: the file itself, a folder that holds it, or a hub id (`owner/name`, or
    `owner/name@revision`). `elsewhere` tells of another place to have it from, for messages.
    """

    reward: str
    option: str
    place: str
    name: str
    elsewhere: str = ""

    def check(self) -> None:
        """UserError when it is plain without any network that the file is not there."""
        from huggingface_hub import constants

        if self._local() is None and constants.HF_HUB_OFFLINE:
            self.find()

    def find(self) -> Path:
        """The file on this machine, fetched from the hub if need be; UserError saying how to get it."""
        found = self._local()
        return self._download() if found is None else found

    def _local(self) -> Path | None:
        """The local file; None for a hub id; UserError for neither."""
        path = Path(self.place).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            if (path / self.name).is_file():
                return path / self.name
            raise self._missing(f"there is no {self.name} in the folder {self.place}")
        if HUB_ID.fullmatch(self.place):
            return None
        raise self._missing(f"{self.place} does not exist (looked from {Path.cwd()}), and it is no hub id")

    def _download(self) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HTTPError, XetDownloadError

        repo, _, revision = self.place.partition("@")
        try:
            return Path(hf_hub_download(repo, self.name, revision=revision or None))
        except (OSError, ValueError, EntryNotFoundError, HTTPError, XetDownloadError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise self._missing(
                f"{self.name} of {self.place} is not on this machine and could not be fetched ({reason})"
            ) from error

    def _missing(self, what: str) -> UserError:
        repo, _, revision = self.place.partition("@")
        hub = repo if HUB_ID.fullmatch(self.place) and not Path(repo).exists() else ""
        fetch = f"hf download {hub} {self.name}" + (f" --revision {revision}" if revision else "")
        advice = [f"fetch it by `{fetch}`"] if hub else []
        advice += [self.elsewhere] if self.elsewhere else []
        advice += [f"give `{self.option}`: the file, a folder with it, or a hub id"]
        return UserError(f"reward '{self.reward}': {what}. What to do: {'; or '.join(advice)}.")


def read_tensors(file: Path, *, reward: str, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU; `inside` names the entry that holds them, if one does.

    UserError for a file that is cut off, or that holds anything that is not plain data.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise UserError(
            f"reward '{reward}': {file} cannot be read as tensors only: it is cut off, or it holds code, which is not "
            "run; get the official file again"
        ) from error
    except Exception as error:  # each format has errors of its own for a broken file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"reward '{reward}': {file} cannot be read, it may be cut off: {reason}") from error
    if inside is not None and isinstance(content, dict) and inside in content:
        content = content[inside]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        wanted = f" under '{inside}'" if inside else ""
        raise UserError(f"reward '{reward}': {file} holds no table of named tensors{wanted}")
    return content


def load_whole(
    network: nn.Module, tensors: Mapping[str, Tensor], place: Place, *, unused: str, reward: str, file: Path
) -> None:
    """Fill every tensor of `network` from those of a file, and leave none of the file's over.

    `unused`: a pattern of names that the file may have besides, and that the network does not need.
    UserError names what is missing, what is left over and what has another shape, in the file's own names.
    """
    filled, used, missing, misshapen = {}, set(), [], []
    for key, own in network.state_dict().items():
        name, take = place(key)
        used.add(name)
        if name not in tensors:
            missing.append(name)
            continue
        filled[key] = take(tensors[name])
        if filled[key].shape != own.shape:
            misshapen.append(f"{name} {tuple(tensors[name].shape)}")
    extra = [name for name in tensors if name not in used and not re.fullmatch(unused, name)]
    faults = {"missing": missing, "not of it": extra, "of another size": misshapen}
    if any(faults.values()):
        told = "; ".join(_told(fault, names) for fault, names in faults.items() if names)
        raise UserError(
            f"reward '{reward}': the tensors of {file} are not this model's, so it was not loaded. {told}. Is it the "
            "right file, and whole?"
        )
    network.load_state_dict(filled)


def _told(fault: str, names: list[str]) -> str:
    """Each of the file's tensors once: several of ours may come from one."""
    different = list(dict.fromkeys(names))
    return f"{len(different)} {fault}: {', '.join(different[:3])}" + (", …" if len(different) > 3 else "")


def same_name(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """For files that name their tensors as the network does."""
    return key, unchanged


def unchanged(tensor: Tensor) -> Tensor:
    """The file's tensor as it is."""
    return tensor

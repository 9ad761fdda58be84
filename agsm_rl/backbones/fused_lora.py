"""`backbone.lora`: a LoRA from a file, a folder or the hub, added to a pipeline's weights before anything is trained.

The weights are added here, not by `pipe.load_lora_weights`: that passes over tensors that fit nothing, and imports
what a file's metadata names.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from torch import nn

from agsm_rl.adapters.lora_config import PARTS
from agsm_rl.adapters.lora_files import CONFIG_FILE, read_lora
from agsm_rl.errors import UserError

logger = logging.getLogger(__name__)


@torch.no_grad()
def fuse_lora(pipeline: Any, file: Path, *, where: str) -> None:
    """Add a LoRA to the weights of a pipeline; on the meta device it is only seen that it fits.

    `where` begins the messages. UserError for a file that is no LoRA, or that has a tensor without a place in the
    pipeline (see `read_lora`).
    """
    lora = read_lora(file, where=where)
    if lora.second_bank:
        logger.warning("%s: has a bank for negative prompts, which is left out; the positive one is used", file)
    parts = lora_parts(pipeline)
    for part, additions in lora.place(parts, where=where).items():
        for module, addition in additions.items():
            weight = parts[part].get_parameter(f"{module}.weight")
            if not weight.is_meta:
                weight.copy_(addition.applied(weight))


def lora_parts(pipeline: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that a LoRA may change, by their names in it."""
    return {name: part for name in PARTS if isinstance(part := getattr(pipeline, name, None), nn.Module)}


def lora_in_folder(folder: Path, *, where: str) -> Path:
    """The only .safetensors file of a folder; UserError where there is none, or several to choose from."""
    files = sorted(folder.glob("[!.]*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{where}: {_not_one(folder, files)}")
    return files[0]


def lora_of_hub(repository: str, *, where: str, local_files_only: bool) -> Path:
    """The only .safetensors file of a repository, fetched with PEFT's adapter_config.json where it has one.

    UserError where it has none or several; the hub's own errors otherwise.
    """
    if local_files_only:
        return lora_in_folder(Path(snapshot_download(repository, local_files_only=True)), where=where)
    names = HfApi().list_repo_files(repository)
    files = [Path(name) for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(files) != 1:
        raise UserError(f"{where}: {_not_one(repository, files)}")
    if CONFIG_FILE in names:
        hf_hub_download(repository, CONFIG_FILE)
    return Path(hf_hub_download(repository, str(files[0])))


def _not_one(place: Any, files: list[Path]) -> str:
    if not files:
        below = sorted(place.glob("*/*.safetensors")) if isinstance(place, Path) else []
        hint = f" {', '.join(str(file) for file in below[:3])} may be meant." if below else ""
        return f"there is no .safetensors file in {place}.{hint}"
    names = ", ".join(file.name for file in files[:6])
    return f"{place} has {len(files)} .safetensors files ({names}); give the one that is meant, by its path."

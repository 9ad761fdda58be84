"""What the name of a checkpoint refers to, answered without loading diffusers."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from agsm_rl.errors import unknown_name
from agsm_rl.files import local_or_hub

BUILTINS = Path(__file__).parents[1] / "shapes" / "checkpoints"
ALLOWED = "an existing folder, a .safetensors file, a hub id (owner/name), or a builtin such as builtin:shapes-sd15"

DENOISER = "model.diffusion_model."
"""What the names of a denoiser's tensors begin with in most single files."""


def find_checkpoint(checkpoint: str, where: str = "backbone.checkpoint") -> str:
    """The folder of a `builtin:` name, a local path with `~` expanded, or a hub id; UserError for anything else.

    `where` is the key that names it.
    """
    if not checkpoint.startswith("builtin:"):
        path = local_or_hub(checkpoint, where=f"{where}:", allowed=ALLOWED)
        return checkpoint if path is None else str(path)
    name = checkpoint.removeprefix("builtin:")
    there = {path.parent.name for path in BUILTINS.glob("*/model_index.json")}
    if name not in there:
        raise unknown_name(where, checkpoint, "a builtin base", {f"builtin:{one}" for one in there})
    return str(BUILTINS / name)


def is_single_file(path: Path) -> bool:
    """Whether this is a readable .safetensors file that holds a pipeline in the original layout; by its names alone."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as content:
            names = list(content.keys())
    except (OSError, SafetensorError):
        return False
    return any(name.startswith(DENOISER) for name in names)

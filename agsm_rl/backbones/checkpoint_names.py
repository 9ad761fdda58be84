"""What the name of a checkpoint refers to, answered without loading diffusers."""

from pathlib import Path

from agsm_rl.errors import unknown_name
from agsm_rl.files import local_or_hub

BUILTINS = Path(__file__).parents[1] / "shapes" / "checkpoints"
ALLOWED = "an existing folder, a .safetensors file, a hub id (owner/name), or a builtin such as builtin:shapes-sd15"


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

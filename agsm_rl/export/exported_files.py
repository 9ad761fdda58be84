"""Where exported adapters are: in a run folder, in a folder of their own, or a file."""

from pathlib import Path

from agsm_rl.errors import UserError
from agsm_rl.files import check_not_special, local_path


def find_exports(path: Path) -> list[Path]:
    """The .safetensors files in a run folder or an adapter folder; a path of a file gives that file."""
    path = local_path(path)
    check_not_special(path)
    if path.is_file():
        return [path]
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not folder.is_dir():
        raise UserError(f"{path}: there is no such file or folder; give a run folder or an exported adapter.")
    files = sorted(folder.glob("[!.]*.safetensors"))
    if not files:
        raise UserError(f"{folder}: there is no .safetensors file in it; has the run exported an adapter yet?")
    return files

"""`agsm-rl convert`: trained adapters to and from the file formats of other tools.

Soft tokens are published as two PyTorch files. Reading them runs no code:

| | tokens, width D | time rows, a pickled nn.Embedding |
|---|---|---|
| SoftREPA (arXiv 2503.08250) | `dc_tokens.pth` (n, D); SD3 (L, n, D) | `dc_t_tokens.pth` (100, D); SD3 (100, L·D) |
| AGSM (arXiv 2605.30038) | `soft_tokens.pth` (banks, n, D); SD3 (banks, L, n, D) | `soft_t_tokens.pth`, the same |

The metadata records how the authors' code uses them: only the down blocks see SoftREPA's SD1.5 tokens, and guidance on
SDXL uses AGSM's negative bank for its unconditional branch.

kohya.py handles LoRA, LoHa and LoKr in kohya's and LyCORIS' form, peft_folder.py writes PEFT's own.
"""

import errno
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agsm_rl.adapters.lora_files import NEGATIVE_PREFIX
from agsm_rl.adapters.soft_tokens import TIME_ROWS, SoftTokens, describe_tokens
from agsm_rl.adapters.tensor_files import check_tensor
from agsm_rl.adapters.token_places import PUBLISHED_PLACES
from agsm_rl.errors import UserError
from agsm_rl.export.attach import find_exports, read_export, write_export
from agsm_rl.export.kohya import ALPHA, read_kohya, write_kohya
from agsm_rl.export.peft_folder import write_peft
from agsm_rl.export.published import BACKBONES, BASE_OF_WIDTH
from agsm_rl.files import check_not_special, replacing

Form = Literal["agsm-rl", "agsm", "softrepa", "kohya", "peft"]
NAMES = {"softrepa": ("dc_tokens.pth", "dc_t_tokens.pth"), "agsm": ("soft_tokens.pth", "soft_t_tokens.pth")}
"""The files of each form: tokens and time rows. Published files may have a prefix, as in `sd1.5_dc_tokens.pth`."""
POSITIVE_ALONE = "{}: has two banks; this form holds one, and gets the positive one, which draws."
OF_PEFT = (*ALPHA, "oft")
"""The kinds of adapter that PEFT makes."""


def convert(
    source: Path, out: Path, form: Form | None = None, *, tell: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Write `source` to `out` in another form, and return the files.

    - `agsm-rl` reads published token files (the tokens' file, or its folder) or a .safetensors file in kohya's form,
      and writes a .safetensors file for `attach`; a LoRA's also works with `pipe.load_lora_weights`.
    - `agsm` and `softrepa` read a run folder, an adapter folder or an exported file, and write a folder with the two
      token files. SoftREPA's form has one bank, and gets the positive one.
    - `kohya` reads the same, and writes the positive bank of a LoRA, LoHa or LoKr to a .safetensors file.
    - `peft` reads the same, and writes the positive bank of any adapter of PEFT's to a folder for each changed model.

    Args:
        source: What to convert.
        out: A .safetensors file for `agsm-rl` and `kohya`, otherwise a folder.
        form: By default `agsm-rl` if `out` is a .safetensors file; otherwise `agsm`, or `softrepa` for a single bank.
        tell: Called with each note for the user.

    Raises UserError, and writes nothing, if the source does not hold such an adapter or contradicts itself.
    """
    if form is None and out.suffix == ".safetensors":
        form = "agsm-rl"
    if form in ("agsm-rl", "kohya") and out.suffix != ".safetensors":
        raise UserError(f"OUT {out}: with --to {form} this must be a file whose name ends in .safetensors.")
    if form == "agsm-rl":
        if source.suffix == ".safetensors":
            tensors, metadata = read_kohya(source)
        else:
            tensors = read_published(source)
            if "time_tokens" not in tensors:
                file, published = _tokens_file(source)
                tell(f"{file}: there is no {_times_file(file, published).name} beside it; converted without time rows.")
            base = BACKBONES.get(BASE_OF_WIDTH.get(tensors["soft_tokens"].shape[-1], ""), "")
            metadata = describe_tokens(tensors, base=base) | _as_their_authors(tensors, _tokens_file(source)[1])
            metadata |= {"name": "tokens"}
        with _writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_export(out, tensors, metadata)
        return [out]
    if form == "kohya":
        tensors, metadata = _export_of(source, tuple(ALPHA), tell)
        _tell_of_second_bank(tensors, source, tell)
        with _writing(out):
            write_kohya(tensors, metadata, out)
        return [out]
    if form == "peft":
        tensors, metadata = _export_of(source, OF_PEFT, tell)
        _tell_of_second_bank(tensors, source, tell)
        with _writing(out):
            return write_peft(tensors, metadata, out)
    tensors, metadata = _export_of(source, (SoftTokens.kind,), tell)
    banks = SoftTokens.from_export(tensors, metadata).banks
    form = form or ("agsm" if banks == 2 else "softrepa")
    if form == "softrepa" and banks == 2:
        tell(POSITIVE_ALONE.format(source))
    authors = _as_their_authors(tensors, form)
    defaults = {"guidance_bank": "positive", "guidance_prompt": "empty"}
    for key, default in defaults.items():
        ours, theirs = metadata.get(key, default), authors.get(key, default)
        if ours != theirs:
            tell(f"OUT {out}: these tokens are for `{key}: {ours}`, but the authors' code draws with {theirs}.")
    if "layers" not in metadata:
        theirs = authors.get("places", ",".join(PUBLISHED_PLACES))
        ours = metadata.get("places", ",".join(PUBLISHED_PLACES))
        if ours != theirs:
            tell(f"OUT {out}: these tokens belong in the {ours} blocks, but the authors' code puts them in {theirs}.")
    return write_published(tensors, out, form)


def _as_their_authors(tensors: dict[str, Tensor], form: Literal["agsm", "softrepa"]) -> dict[str, str]:
    """The metadata that makes published tokens act as in their authors' code, where it is not the default."""
    base = BASE_OF_WIDTH.get(tensors["soft_tokens"].shape[-1])
    if (form, base) == ("softrepa", "SD1.5"):
        return {"places": "down"}
    if (form, base) == ("agsm", "SDXL") and len(tensors["soft_tokens"]) == 2:
        return {"guidance_bank": "negative"}
    return {}


def read_published(path: Path) -> dict[str, Tensor]:
    """Read published token files as our tensors: `soft_tokens` and, if there are time rows, `time_tokens`.

    `path` is the tokens' file, or a folder with one. UserError if a file is damaged, holds anything other than a tensor
    or an embedding (no code in it is run), or has other shapes than the table at the top.
    """
    file, form = _tokens_file(path)
    tokens = _read(file)
    banks = tokens[None] if form == "softrepa" else tokens
    if banks.ndim not in (3, 4) or (form == "agsm" and len(banks) not in (1, 2)):
        allowed = "(n, D) or (L, n, D)" if form == "softrepa" else "(banks, n, D) or (banks, L, n, D), banks 1 or 2"
        raise UserError(f"{file}: has shape {tuple(tokens.shape)}; it must be {allowed}.")
    tensors = {"soft_tokens": banks}
    times = _times_file(file, form)
    if times.is_file():
        layers = banks.shape[1] if banks.ndim == 4 else 1
        table = (TIME_ROWS, layers * banks.shape[-1])
        tensors["time_tokens"] = _read(times)
        if tensors["time_tokens"].shape != table:
            raise UserError(f"{times}: has shape {tuple(tensors['time_tokens'].shape)}; it must be {table}.")
    return tensors


def write_published(tensors: dict[str, Tensor], folder: Path, form: Literal["agsm", "softrepa"]) -> list[Path]:
    """Write our tensors as the files of a form; that of the time rows only if there are any.

    Both files are written under temporary names first, so that a failure or a kill leaves the old ones. UserError if
    they cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"OUT {folder}: this is a file; with --to {form} it must be a folder.")
    tokens = tensors["soft_tokens"]
    contents: list[Any] = [nn.Parameter(tokens[0].clone() if form == "softrepa" else tokens)]
    if "time_tokens" in tensors:
        contents.append(nn.Embedding.from_pretrained(tensors["time_tokens"], freeze=False))
    elif (folder / NAMES[form][1]).exists():
        raise UserError(
            f"OUT {folder}: holds {NAMES[form][1]}, the time rows of other tokens, but these tokens have none. Delete "
            "it, or choose another folder."
        )
    files = [folder / name for name in NAMES[form][: len(contents)]]
    with _writing(folder), ExitStack() as renaming:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        asides = [renaming.enter_context(replacing(file)) for file in files]
        for content, aside in zip(contents, asides, strict=True):
            buffer = BytesIO()
            torch.save(content, buffer)  # into memory: on a full disk torch would not raise OSError
            with aside.open("wb") as file_aside:
                file_aside.write(buffer.getbuffer())
                file_aside.flush()
                os.fsync(file_aside.fileno())
    return files


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn an OSError into a UserError about OUT."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"OUT {out}: cannot be written ({error.strerror or error}); what was there before is unchanged."
        ) from error


def _tokens_file(path: Path) -> tuple[Path, Literal["agsm", "softrepa"]]:
    check_not_special(path)
    files = [path] if path.is_file() else sorted(path.glob("*.pth"))
    forms: tuple[Literal["agsm", "softrepa"], ...] = ("agsm", "softrepa")
    matches = [(file, form) for file in files for form in forms if file.name.endswith(NAMES[form][0])]
    if len(matches) != 1:
        names = ", ".join(file.name for file, _ in matches) or "none"
        raise UserError(
            f"{path}: {len(matches)} files of soft tokens ({names}); give one whose name ends in "
            f"{' or '.join(NAMES[form][0] for form in forms)}, or a folder with exactly one."
        )
    return matches[0]


def _times_file(tokens: Path, form: Literal["agsm", "softrepa"]) -> Path:
    return tokens.with_name(tokens.name.removesuffix(NAMES[form][0]) + NAMES[form][1])


def _read(file: Path) -> Tensor:
    """The tensor in a file, in float32; UserError unless it is finite."""
    if not file.is_file():  # opening a named pipe would block forever
        raise UserError(f"{file}: is not a regular file.")
    try:
        # Besides tensors, published files hold this class only; unpickling it just fills its attributes.
        with torch.serialization.safe_globals([nn.Embedding]):
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Quote only the name: torch's message goes on to advise loading the file without this check.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"this file wants {named[1]}" if named else "this file holds something else, or it is damaged"
        raise UserError(
            f"{file}: refused, and nothing in it was run. Soft tokens are a tensor or an nn.Embedding; {what}."
        ) from error
    except Exception as error:  # a broken archive fails in many ways
        cause = str(error) or type(error).__name__
        raise UserError(f"{file}: cannot be read; it is truncated or not a PyTorch file ({cause}).") from error
    tensor = getattr(content, "weight", None) if isinstance(content, nn.Embedding) else content
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise UserError(
            f"{file}: holds a {type(tensor).__name__}; it must hold a floating-point tensor or an nn.Embedding."
        )
    check_tensor(tensor, f"{file}: its tensor")
    return tensor.detach().float().contiguous()


def _tell_of_second_bank(tensors: dict[str, Tensor], source: Path, tell: Callable[[str], None]) -> None:
    if any(name.startswith(NEGATIVE_PREFIX) for name in tensors):
        tell(POSITIVE_ALONE.format(source))


def _export_of(
    source: Path, kinds: tuple[str, ...], tell: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The only exported adapter of these kinds in a run folder, an adapter folder or a file.

    `tell` is called for each of the others, which the form cannot hold.
    """
    exports = {file: read_export(file) for file in find_exports(source)}
    matches = [export for export in exports.values() if export[1]["kind"] in kinds]
    if len(matches) != 1:
        contents = ", ".join(f"{file.name} ({export[1]['kind']})" for file, export in exports.items())
        wanted = " or ".join(f"'{kind}'" for kind in kinds)
        hint = " PEFT's OFT has no other form than PEFT's own: --to peft." if "oft" in contents else ""
        raise UserError(
            f"{source}: has {len(matches)} adapters of kind {wanted}, but must have exactly one. It holds: {contents}."
            f"{hint if 'lora' in kinds and 'oft' not in kinds else ''}"
        )
    for file, (_, metadata) in exports.items():
        if metadata["kind"] not in kinds:
            tell(f"{file}: is left out ({metadata['kind']}); this form has no place for it.")
    return matches[0]

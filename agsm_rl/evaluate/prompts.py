"""Prompts to evaluate on, from a file or a data set: COCO's captions, DrawBench, PartiPrompts, HPDv2, one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError, unknown_name

COLUMNS = ("prompt", "caption", "text", "Prompt", "Prompts")
"""Looked for in this order where no column is named."""
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
BUILTIN = "builtin:shapes-prompts"


def read_prompts(
    prompts: str, *, column: str | None = None, split: str | None = None, limit: int | None = None
) -> dict[int, dict[str, Any]]:
    """Number → {"prompt"} of a text file (a prompt a line), a jsonl, csv or parquet file, or a `datasets` name.

    column: of the prompts. split: of a data set, its first where none is named. limit: how many are read at most.
    A builtin: `builtin:shapes-prompts` (split `held_out`). UserError where there is none, or one is not a text.
    """
    path = Path(prompts)
    if prompts.startswith("builtin:"):
        texts = _builtin(prompts, split or "held_out", limit or 200)
    elif path.suffix in LOADERS:
        _need(path)
        texts = _column(_load(LOADERS[path.suffix], prompts, None, path), prompts, column, limit)
    elif path.is_file():
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {prompts}: it is no text in UTF-8 ({error}); save it so.") from error
        texts = [line for line in lines if line][:limit]
    elif path.suffix == ".txt" or (prompts.startswith((".", "/", "~")) and not path.is_dir()):
        raise _missing(prompts)
    else:
        texts = _column(_load(prompts, prompts, split, None), prompts, column, limit)
    if not texts:
        raise UserError(f"--prompts {prompts}: it has no prompts; give one or more.")
    return {index: {"prompt": text} for index, text in enumerate(texts)}


def _builtin(prompts: str, split: str, limit: int) -> list[str]:
    from agsm_rl.shapes import data

    if prompts != BUILTIN:
        raise unknown_name("--prompts", prompts, "a builtin list of prompts", [BUILTIN])
    return data.prompts(split, limit, seed=0)


def _load(loader: str, prompts: str, split: str | None, path: Path | None) -> Any:
    import datasets

    options: dict[str, Any] = {"data_files": str(path)} if path else {}
    if path and path.suffix == ".tsv":
        options["sep"] = "\t"
    try:
        found = datasets.load_dataset(loader, **options)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"--prompts {prompts}: it cannot be opened ({reason}); give a .txt, .jsonl, .csv or .parquet file, or a "
            "name that `load_dataset` takes."
        ) from error
    if split is not None and split not in found:
        raise unknown_name("--prompt-split", split, f"a split of {prompts}", found)
    return found[split or next(iter(found))]


def _column(found: Any, prompts: str, column: str | None, limit: int | None) -> list[str]:
    there = list(found.column_names)
    known = [name for name in COLUMNS if name in there] if column is None else [column]
    if not known:
        raise UserError(
            f"--prompts {prompts}: none of its columns ({', '.join(there)}) is named {', '.join(COLUMNS[:3])}; say "
            "which one has the prompts by --prompt-column."
        )
    if known[0] not in there:
        raise unknown_name("--prompt-column", known[0], f"a column of {prompts}", there)
    rows = found.select_columns([known[0]])
    texts = rows.select(range(min(limit or len(rows), len(rows))))[known[0]]
    return [_text(value, f"--prompts {prompts}: row {row}, '{known[0]}'") for row, value in enumerate(texts)]


def _text(value: Any, where: str) -> str:
    """A prompt; of several captions of one image (COCO) the first."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, Mapping) or not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: it is {value!r:.60}, but a prompt is a text that is not empty.")
    return value.strip()


def _need(path: Path) -> None:
    if not path.is_file():
        raise _missing(str(path))


def _missing(prompts: str) -> UserError:
    return UserError(
        f"--prompts {prompts}: there is no such file; give a .txt (a prompt a line), .jsonl, .csv or .parquet file, a "
        f"name that `load_dataset` takes, or {BUILTIN}."
    )

"""Lists of prompts, read the same way wherever a recipe or a command names one.

A text file (one prompt per line), a table (.jsonl, .json, .csv, .tsv, .parquet: GenEval's, DrawBench, PartiPrompts,
HPDv2, one's own), a folder or a name on the hub that holds one, or a builtin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.files import check_regular, local_or_hub
from agsm_rl.sources.other_columns import other_columns
from agsm_rl.sources.tables import TABLES, columns_of, read_lines, read_rows

BUILTINS = ("builtin:shapes-prompts", "builtin:scenes-prompts")
COLUMNS = ("prompt", "caption", "text", "Prompt", "Prompts")
"""Looked for in this order where no column is named."""
LONGEST = 20_000
"""Characters of a prompt: tokenizers keep some hundreds, and a file of one line is no list of prompts."""
NOT_TEXT = (".yaml", ".yml", ".xml", ".html", ".xlsx", ".xls", ".ods", ".pdf", ".docx", ".zip", ".gz", ".tar", ".arrow")
"""Files that are not lists of prompts, though some could be read as text."""
ALLOWED = (
    f"a text file (one prompt per line), a table (jsonl, json, csv, tsv, parquet), a folder or a name on the hub "
    f"(owner/name) that holds one, {BUILTINS[0]} or {BUILTINS[1]}"
)
RECIPE_OPTIONS = {"column": "prompt_column", "split": "prompt_split", "config": "prompt_config"}
CLI_OPTIONS = {"column": "--prompt-column", "split": "--prompt-split", "config": "its folder in place of the whole"}
"""What messages call the options by which a list is chosen."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what the other columns of its row say (`other_columns`)."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(
    prompts: str,
    *,
    column: str | None = None,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    where: str = "prompts",
) -> list[Prompt]:
    """The prompts of a builtin, a file, a folder or a hub's data set, in order.

    column: the one that holds them. split: of a data set or the builtin; the first where none is named. config: of a
    data set that has several. limit: how many are read at most. where: the key or option, for messages. UserError where
    there are none, or one is not a text.
    """
    named = f"{where} '{prompts}'"
    options = CLI_OPTIONS if where.startswith("-") else RECIPE_OPTIONS
    if prompts.startswith("builtin:"):
        _check_no_column(column, named, options["column"])
        if config is not None:
            raise UserError(f"{named}: '{config}' is asked for, but it has no configuration; leave that option out")
        return _builtin(prompts, split or "train", limit or 2000, where)
    path = local_or_hub(prompts, where=where, allowed=ALLOWED)
    if path is not None and not path.is_dir():
        check_regular(path)
    if path is None or path.is_dir():
        rows = _of_data_set(prompts, split, config, column, limit, named, options)
    elif path.suffix.lower() in TABLES:
        rows = read_rows(path, named)
        _check_no_split(split, config, named)
    else:
        _check_no_split(split, config, named)
        _check_no_column(column, named, options["column"])
        rows = [(f"line {number}", {"prompt": line}) for number, line in enumerate(_text_lines(path, named), 1)]
    if not rows:
        raise UserError(f"{named}: it has no prompts; give one or more")
    key = _column(columns_of(rows), column, named, options["column"])
    return [_prompt(row, key, f"{named}: {place}") for place, row in islice(rows, limit)]


def _builtin(prompts: str, split: str, count: int, where: str) -> list[Prompt]:
    from agsm_rl.shapes import data

    if prompts not in BUILTINS:
        raise unknown_name(where, prompts, "a builtin list of prompts", BUILTINS)
    return [Prompt(text) for text in data.prompts(split, count, seed=0, world=data.PROMPTS[prompts])]


def _text_lines(path: Path, where: str) -> list[str]:
    if path.suffix.lower() in NOT_TEXT:
        raise UserError(f"{where}: a {path.suffix} file is not a list of prompts; give {ALLOWED}")
    lines = read_lines(path, where)
    if lines and "\0" in lines[0]:
        raise UserError(f"{where}: it cannot be read as text (it holds zero bytes); give {ALLOWED}")
    if lines and lines[0].startswith(("{", "[")) and lines[0].endswith(("}", "]")) and '"' in lines[0]:
        raise UserError(f"{where}: its lines look like JSON, not prompts; rename it to .jsonl to read it as a table")
    return lines


def _of_data_set(
    prompts: str,
    split: str | None,
    config: str | None,
    column: str | None,
    limit: int | None,
    where: str,
    options: Mapping[str, str],
) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows of a folder's or hub's data set, without its images."""
    import datasets

    from agsm_rl.sources.images import open_dataset

    try:
        found = open_dataset(
            prompts, split=split, config=config, num_rows=limit, streaming=False, builtins={}, where=where
        )
    except UserError as error:
        message = str(error).replace(f"{where}: split:", f"{where}: {options['split']}:")
        raise UserError(message.replace("`config:`", options["config"])) from error
    pictures = [name for name, feature in found.features.items() if isinstance(feature, datasets.Image)]
    texts = found.remove_columns([name for name in pictures if name != column])
    return [(f"row {number}", row) for number, row in enumerate(texts)]


def _check_no_split(split: str | None, config: str | None, where: str) -> None:
    for name, value in {"split": split, "configuration": config}.items():
        if value is not None:
            raise UserError(f"{where}: '{value}' is asked for, but a single file has no {name}; leave that option out")


def _check_no_column(column: str | None, where: str, option: str) -> None:
    if column is not None:
        raise UserError(f"{where}: {option} '{column}' has no effect: it is a list, without columns; leave it out")


def _column(columns: list[str], column: str | None, where: str, option: str) -> str:
    if column is not None:
        if column not in columns:
            raise unknown_name(f"{where}: {option}", column, "a column of it", columns)
        return column
    known = [name for name in COLUMNS if name in columns]
    if not known:
        raise UserError(
            f"{where}: none of its columns ({', '.join(columns)}) is called {', '.join(COLUMNS[:3])}; say which one "
            f"holds the prompts by {option}"
        )
    return known[0]


def _prompt(row: Mapping[str, Any], column: str, where: str) -> Prompt:
    """A row's prompt; of several captions of one image (COCO) the first."""
    value = row.get(column)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: '{column}' is {value!r:.60}, but a prompt is a text that is not empty")
    if len(value) > LONGEST:
        raise UserError(f"{where}: it has {len(value):,} characters, but a prompt has at most {LONGEST:,}")
    return Prompt(value.strip(), other_columns(row, [column]))

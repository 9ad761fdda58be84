"""Text files and tables as people write them: .txt, .jsonl, .json, .csv, .tsv, .parquet → rows with their numbers.

Prompts and the metadata of image folders are read here, by one set of rules. Lines end where every editor says they
do (\\n, \\r\\n, \\r): JSON allows U+2028 inside a text, and Python's `splitlines` would cut there. A byte order mark is
dropped, blank lines are skipped, and quoted CSV cells may hold line ends.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agsm_rl.errors import UserError

Row = Mapping[str, Any]
TABLES = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".jsonlines": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""How the names of tables end, in lower case."""
SEPARATORS = {";": "semicolons", ",": "commas", "\t": "tabs", "|": "bars"}
"""What people's tables separate columns by."""
LINE_END = re.compile("\r\n|\n|\r")


def read_text(path: Path, where: str) -> str:
    """A UTF-8 file's text without its byte order mark; UserError, with the line, where it is not UTF-8."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")  # opening a named pipe would block forever
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: it cannot be read ({error.strerror or error})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(LINE_END.findall(content[: error.start].decode("latin-1"))) + 1
        raise UserError(
            f"{where}: it cannot be read as text (line {line} is not valid utf-8); save it as UTF-8"
        ) from error


def read_lines(path: Path, where: str) -> list[str]:
    """The lines of a text file without surrounding space; blank ones are left out."""
    lines = (line.strip() for line in LINE_END.split(read_text(path, where)))
    return [line for line in lines if line]


def read_rows(path: Path, where: str) -> list[tuple[str, Row]]:
    """A table's rows, each with its place for messages ("line 3", "row 3").

    A line or element of JSON that is a text, not an object, is a row with the one column `prompt`. UserError, with the
    place, for a file or a row that cannot be read.
    """
    kind = TABLES[path.suffix.lower()]
    if kind == "parquet":
        return _parquet_rows(path, where)
    text = read_text(path, where)
    if kind == "csv":
        return list(_csv_rows(text, where, "\t" if path.suffix.lower() == ".tsv" else ","))
    return _json_rows(text, where)


def columns_of(rows: list[tuple[str, Row]]) -> list[str]:
    """All columns' names, in the order in which they appear."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def _json_rows(text: str, where: str) -> list[tuple[str, Row]]:
    """Rows of JSON lines or of one JSON document: people name either .json or .jsonl."""
    lines = [(number, line) for number, line in enumerate(LINE_END.split(text), 1) if line.strip()]
    try:
        document = json.loads(text) if lines else []
    except RecursionError as error:
        raise UserError(f"{where}: its JSON is nested too deeply to be a table") from error
    except ValueError:
        return [(f"line {number}", _json_row(line, f"{where}: line {number}")) for number, line in lines]
    return [(f"row {number}", row) for number, row in enumerate(_rows_of_document(document, where))]


def _json_row(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: it is not valid JSON ({error})") from error
    return _as_row(value, where)


def _rows_of_document(document: Any, where: str) -> Iterator[Row]:
    """A list of rows, one row, or a mapping of columns to their values."""
    if isinstance(document, Mapping) and document and all(isinstance(value, list) for value in document.values()):
        if len({len(values) for values in document.values()}) > 1:
            raise UserError(f"{where}: its columns ({', '.join(map(str, document))}) are of different lengths")
        yield from (dict(zip(document, values, strict=True)) for values in zip(*document.values(), strict=True))
        return
    for number, value in enumerate(document if isinstance(document, list) else [document]):
        yield _as_row(value, f"{where}: row {number}")


def _as_row(value: Any, where: str) -> Row:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, Mapping):
        return value
    raise UserError(f"{where}: it is {value!r:.60}, but a row is a JSON object with the columns as its keys")


def _csv_rows(text: str, where: str, delimiter: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [name.strip() for name in cells]
                _check_separator(header, delimiter, where)
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    raise UserError(f"{where}: its header names the column '{twice[0]}' twice; rename one")
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where}: line {reader.line_num} has {len(cells)} cells, but the header names {len(header)} "
                    f"({', '.join(header)}); put quotes around a text that holds the separator"
                )
            yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num} cannot be read as a table ({error})") from error


def _check_separator(header: list[str], delimiter: str, where: str) -> None:
    """UserError for a header of one column that holds another separator: a spreadsheet in many languages writes `;`."""
    for other, name in SEPARATORS.items():
        if len(header) == 1 and other != delimiter and other in header[0]:
            raise UserError(
                f"{where}: its columns are separated by {name} ({header[0]:.100}), but a .csv is read with commas and "
                "a .tsv with tabs; save it so, or as .jsonl"
            )


def _parquet_rows(path: Path, where: str) -> list[tuple[str, Row]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except Exception as error:  # whatever the reader makes of a stranger's bytes
        raise UserError(f"{where}: it cannot be opened as parquet ({' '.join(str(error).split())[:200]})") from error
    return [(f"row {number}", row) for number, row in enumerate(rows)]

"""JSON files that are kept for a later session, and validated when they are read.

A damaged file counts as missing: a warning is logged, and the file is made again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from agsm_rl.errors import UserError
from agsm_rl.files import parse_json, read_text

log = logging.getLogger(__name__)


class KeptFile(BaseModel):
    """The shape of a kept file; further keys are allowed."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


def read_kept(file: Path, shape: type[KeptFile], *, warn: bool = True) -> dict[str, Any]:
    """The content of such a file; empty if it is missing or damaged, which a warning says."""
    warned = warn_damaged if warn else lambda file, reason: None
    if not file.exists():
        return {}
    try:
        text = read_text(file)
        content: dict[str, Any] = parse_json(text, where=str(file))
        shape.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        warned(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": "))
        return {}
    except UserError as error:
        warned(file, str(error).removeprefix(f"{file}: "))
        return {}
    return content


def warn_damaged(file: Path, reason: str) -> None:
    """Warn that a file is damaged and therefore not used."""
    log.warning("%s: is damaged (%s), so it is made again", file, reason)

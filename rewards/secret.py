"""Keys and tokens from environment variables: cleaned before they are used, and never shown."""

from __future__ import annotations

import base64
import os
import re
from urllib.parse import quote, quote_plus

from agsm_rl.errors import UserError

HIDDEN = "•••"
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def secret_from(variable: str, *, who: str) -> str:
    """The value of an environment variable without the line end that secrets in files have; "" if it is not set.

    Raises UserError, which does not show the value, if it holds anything but printable ASCII: no header can carry it.
    """
    value = os.environ.get(variable, "").strip()
    odd = [place for place, character in enumerate(value, 1) if not " " <= character <= "~"]
    if odd:
        raise UserError(
            f"{who}: the environment variable {variable} holds a control or non-ASCII character (number {odd[0]} of "
            f"{len(value)}; the value is not shown), which cannot be sent; set {variable} to plain text"
        )
    return value


def without(secret: str, text: str) -> str:
    """`text` with the secret hidden, also where it is percent-encoded or in base64."""
    if not secret:
        return text
    encoded = base64.b64encode(secret.encode()).decode()
    forms = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), encoded, encoded.rstrip("=")}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text


def without_credentials(url: str) -> str:
    """An address for messages: without user and password, and without its query, which may hold a key."""
    hidden = re.sub(
        r"^([a-z][a-z0-9+.-]*://)?.*(@|%40)", lambda match: f"{match[1] or ''}{HIDDEN}@", url, flags=re.I | re.S
    )
    return re.sub(r"[?#].*", f"?{HIDDEN}", hidden, flags=re.S)

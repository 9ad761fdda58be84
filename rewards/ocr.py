"""Text rendering: how closely the text that OCR reads in an image matches the text that the prompt asks for.

The score is that of Flow-GRPO's OCR reward (arXiv 2505.05470): 1 − min(d, n) / n, where d is the edit distance between
what was read and the wanted text, both without spaces and in lower case, and n the length of the wanted text. Wanted
text that occurs within what was read scores 1. Text is read by RapidOCR, whose wheel carries its models, on the CPU;
Flow-GRPO reads with PaddleOCR, whose models are related but not the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from agsm_rl_rewards.preprocessing import pictures
from torch import Tensor

from agsm_rl.errors import UserError

QUOTES = (('"', '"'), ("“", "”"))
"""How a prompt may quote the wanted text; the first kind that occurs counts."""
LONGEST = 500
"""Characters of wanted text: more than a picture holds, and few enough to be compared at once."""
EXAMPLE = 'a shop sign that says "Open late"'


class OCR:
    """Scores [B] in [0, 1]: 1 if the wanted text was read in the image, 0 if nothing of it was.

    Needs `pip install 'agsm-rl[ocr]'`. Raises UserError if a prompt has no wanted text, or more than 500 characters.

    Args:
        column: The column of the prompts' file that holds the wanted text. Null: the first quoted text of the prompt.
    """

    name = "ocr"
    range = (0.0, 1.0)
    licence = "Apache-2.0 (RapidOCR and PaddleOCR's models)"
    differentiable = False
    takes_metadata = True

    def __init__(self, *, column: str | None = None) -> None:
        self.column = column

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """UserError if a prompt has no wanted text or too much, or if RapidOCR is not installed."""
        self._wanted(prompts, metadata)
        assert self._read

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        wanted = self._wanted(prompts, [{}] * len(prompts) if metadata is None else metadata)
        texts = [self._text(np.asarray(picture)) for picture in pictures(images)]
        return torch.tensor([similarity(text, target) for text, target in zip(texts, wanted, strict=True)])

    def _text(self, picture: np.ndarray) -> str:
        """What is read in a picture, line by line from the top; "" if nothing is."""
        # RapidOCR takes arrays as OpenCV has them, blue first.
        return "".join(self._read(np.ascontiguousarray(picture[..., ::-1])).txts or ())

    @cached_property
    def _read(self) -> Any:
        try:
            import onnxruntime  # noqa: F401 -- rapidocr imports it only when it reads
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(
                f"reward 'ocr': it needs RapidOCR ({error}); install it with `pip install 'agsm-rl[ocr]'`"
            ) from error
        return RapidOCR(params={"Global.log_level": "critical", "Global.use_cls": False})

    def _wanted(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
        if self.column is not None:
            texts = [self._of_column(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        else:
            texts = [quoted(prompt) for prompt in prompts]
        for prompt, text in zip(prompts, texts, strict=True):
            if not plain(text):
                raise UserError(
                    f"reward 'ocr': the prompt '{prompt:.200}' quotes no text; write it as in '{EXAMPLE}', or put the "
                    "text in a column of the prompts' file and name it by `column`"
                )
            if len(plain(text)) > LONGEST:
                raise UserError(
                    f"reward 'ocr': the prompt '{prompt:.200}' asks for a text of {len(plain(text)):,} characters; at "
                    f"most {LONGEST} can be compared"
                )
        return texts

    def _of_column(self, prompt: str, row: Mapping[str, Any]) -> str:
        text = row.get(self.column or "")
        if not isinstance(text, str) or not plain(text):
            raise UserError(
                f"reward 'ocr': column: the prompt '{prompt:.200}' has no text in '{self.column}' (it has the columns "
                f"{', '.join(row) or 'none'}); name the column that holds the wanted text"
            )
        return text


def quoted(prompt: str) -> str:
    """The first quoted text of a prompt; "" if there is none."""
    for opening, closing in QUOTES:
        _, found, rest = prompt.partition(opening)
        text, closed, _ = rest.partition(closing)
        if found and closed:
            return text
    return ""


def plain(text: str) -> str:
    """Text as it is compared: without spaces, in lower case."""
    return text.replace(" ", "").lower()


def similarity(text: str, wanted: str) -> float:
    """1 − min(d, n) / n of the texts as they are compared; 1 if `wanted` occurs in `text`."""
    text, wanted = plain(text), plain(wanted)
    if wanted in text:
        return 1.0
    return 1 - min(edit_distance(text, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete or replace that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, character in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (character != other))
    return row[-1]

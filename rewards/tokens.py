"""Prompts as token ids, by a `tokenizer.json`: one file that holds a tokenizer whole."""

from pathlib import Path

import torch
from torch import Tensor

from agsm_rl.errors import UserError


class Tokens:
    """A tokenizer that cuts to `length` tokens, special ones included, and fills up with `pad`.

    `to_length`: fill up to `length` always, not just to the longest prompt of the batch.
    """

    def __init__(self, file: Path, *, length: int, reward: str, pad: int = 0, to_length: bool = False) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with a file
            raise UserError(f"reward '{reward}': {file} is no tokenizer.json: {error}") from error
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(pad_id=pad, length=length if to_length else None)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (1 for tokens, 0 for filling), both [B, L] of integers, on the CPU."""
        found = self.tokenizer.encode_batch(texts)
        return torch.tensor([one.ids for one in found]), torch.tensor([one.attention_mask for one in found])

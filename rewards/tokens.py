"""Prompts as token ids, by a `tokenizer.json`, a single file that holds a complete tokenizer."""

from pathlib import Path

import torch
from torch import Tensor

from agsm_rl.errors import UserError


class Tokens:
    """A tokenizer that truncates to `length` tokens, special tokens included, and pads with `pad`.

    `to_length`: always pad to `length`, not just to the longest prompt of the batch.
    """

    def __init__(self, file: Path, *, length: int, reward: str, pad: int = 0, to_length: bool = False) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception whatever is wrong with a file
            raise UserError(f"reward '{reward}': {file} is not a tokenizer.json: {error}") from error
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(pad_id=pad, length=length if to_length else None)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (1 for tokens, 0 for padding), both integers [B, L] on the CPU."""
        encoded = self.tokenizer.encode_batch(texts)
        return torch.tensor([row.ids for row in encoded]), torch.tensor([row.attention_mask for row in encoded])

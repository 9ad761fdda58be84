"""Encoded prompts keep which of their rows are read."""

import torch

from agsm_rl.interfaces import Cond


def cond(rows: int, length: int, *, read: int | None = None) -> Cond:
    embeds = torch.arange(1.0, 1 + rows * length * 2).view(rows, length, 2)
    mask = None if read is None else (torch.arange(length) < read).expand(rows, -1)
    return Cond(embeds, prompts=tuple(f"prompt {row}" for row in range(rows)), mask=mask)


def test_texts_of_one_length_without_a_mask_stay_without() -> None:
    both = Cond.cat([cond(2, 3), cond(1, 3)])
    assert both.mask is None and both.embeds.shape == (3, 3, 2)


def test_shorter_texts_are_padded_with_rows_that_are_not_read() -> None:
    both = Cond.cat([cond(1, 2), cond(2, 4, read=3)])
    assert both.mask is not None
    assert both.mask.tolist() == [[True, True, False, False], *[[True, True, True, False]] * 2]
    assert torch.equal(both.embeds[0, :2], cond(1, 2).embeds[0]) and both.embeds[0, 2:].abs().sum() == 0
    assert both.prompts == ("prompt 0", "prompt 0", "prompt 1")


def test_rows_that_are_taken_out_or_repeated_keep_their_mask() -> None:
    both = Cond.cat([cond(1, 2), cond(1, 4)])
    assert both.mask is not None and both[[1, 0]].mask is not None
    assert torch.equal(both[[1, 0]].mask, both.mask[[1, 0]])
    repeated = both[:1].expand(3)
    assert repeated.mask is not None and torch.equal(repeated.mask, both.mask[:1].repeat(3, 1))

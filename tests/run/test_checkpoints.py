"""Checkpoints survive kills and damage, and say so."""

import logging
import pickle

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.run import checkpoints


def test_the_newest_checkpoint_is_loaded_unchanged(tmp_path):
    checkpoints.save(tmp_path, 5, {"step": 5, "tensor": torch.arange(3)})
    checkpoints.save(tmp_path, 10, {"step": 10, "tensor": torch.arange(4)})
    step, state = checkpoints.newest(tmp_path)
    assert step == 10
    assert torch.equal(state["tensor"], torch.arange(4))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoints.save(tmp_path, step, {}, keep=2)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["step-00000003.pt", "step-00000010.pt"]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no checksum"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, caplog, damage):
    checkpoints.save(tmp_path, 1, {"step": 1})
    path = checkpoints.save(tmp_path, 2, {"step": 2})
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.with_suffix(".sha256").unlink()
    with caplog.at_level(logging.WARNING):
        step, _ = checkpoints.newest(tmp_path)
    assert step == 1
    assert "step-00000002.pt is damaged" in caplog.text


def test_if_all_checkpoints_are_damaged_the_run_stops_instead_of_starting_over(tmp_path):
    checkpoints.save(tmp_path, 1, {"step": 1}).write_bytes(b"")
    with pytest.raises(UserError, match="no good checkpoint is left"):
        checkpoints.newest(tmp_path)


def test_damaged_newer_checkpoints_do_not_displace_those_of_a_resumed_run(tmp_path):
    for step in (200, 300, 400):
        path = checkpoints.save(tmp_path, step, {"step": step}, keep=3)
        if step > 200:
            path.write_bytes(b"damaged")
    checkpoints.save(tmp_path, 250, {"step": 250}, keep=1)
    assert checkpoints.newest(tmp_path)[0] == 250


def test_a_kill_during_a_write_leaves_the_older_checkpoint(tmp_path):
    checkpoints.save(tmp_path, 1, {"step": 1})
    (tmp_path / "step-00000002.partial").write_bytes(b"half")
    assert checkpoints.newest(tmp_path)[0] == 1


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoints.newest(tmp_path) is None


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "step-00000001.pt"
    path.write_bytes(pickle.dumps(Trap()))
    path.with_suffix(".sha256").write_text(checkpoints._digest(path))
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        checkpoints.newest(tmp_path)
    assert not (tmp_path / "ran").exists()

"""Rows kept on disk: made once, whatever kills, damage and other processes do meanwhile."""

import multiprocessing
import os
import resource
import shutil
import signal

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.sources import kept_rows
from agsm_rl.sources.kept_rows import KeptRows

ROWS = 20


class FixedShard:
    """One of several processes, without any of them."""

    def __init__(self, index=0, count=1):
        self.index, self.count = index, count


@pytest.fixture(autouse=True)
def four_rows_a_file(monkeypatch):
    monkeypatch.setattr(kept_rows, "FEWEST_ROWS", 4)


def content(number: int):
    """Row 7 has no tensors but a reason."""
    return f"row {number} is no good" if number == 7 else {"number": torch.full((2, 3), float(number)).bfloat16()}


class Maker:
    """Makes rows and notes which."""

    def __init__(self):
        self.made: list[int] = []

    def __call__(self, numbers):
        self.made += numbers
        return [content(number) for number in numbers]


def made(folder, maker=None, shard=None) -> KeptRows:
    rows = KeptRows(folder, ROWS, rows_at_once=3)
    rows.make(maker or Maker(), shard or FixedShard())
    return rows


def assert_right(rows: KeptRows):
    for number in range(ROWS):
        if number != 7:
            assert torch.equal(rows[number]["number"], content(number)["number"])
    with pytest.raises(UserError, match="^row 7 is no good$"):
        rows[7]


def files(folder):
    return sorted(path.name for path in folder.glob("*.arrow"))


def test_rows_are_made_once_and_read_from_memory_mapped_files_of_datasets(tmp_path):
    assert_right(made(tmp_path))
    later = Maker()
    rows = made(tmp_path, later)
    assert later.made == []
    assert_right(rows)
    assert len(files(tmp_path)) == 5
    assert rows._opened[0].cache_files == [{"filename": str(tmp_path / "000-of-005.arrow")}]


def test_a_large_number_of_rows_is_a_bounded_number_of_files(tmp_path):
    assert KeptRows(tmp_path, 1_000_000)._files <= kept_rows.FILES


def test_what_a_kill_left_whole_is_not_made_again(tmp_path):
    def killed_in_the_third_file(numbers):
        if 10 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return [content(number) for number in numbers]

    process = multiprocessing.get_context("fork").Process(target=made, args=(tmp_path, killed_in_the_third_file))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert files(tmp_path) == ["000-of-005.arrow", "001-of-005.arrow"]
    assert (tmp_path / "002-of-005.partial").exists()
    maker = Maker()
    assert_right(made(tmp_path, maker))
    assert maker.made == list(range(8, ROWS))
    assert not list(tmp_path.glob("*.partial"))


def test_two_processes_make_each_row_once_between_them(tmp_path):
    def work(index):
        maker = Maker()
        assert_right(made(tmp_path / "rows", maker, FixedShard(index, 2)))
        (tmp_path / f"made-{index}").write_text(" ".join(map(str, maker.made)))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(index,)) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    numbers = [int(word) for index in range(2) for word in (tmp_path / f"made-{index}").read_text().split()]
    assert sorted(numbers) == list(range(ROWS))


def test_processes_begin_at_different_files(tmp_path):
    maker = Maker()
    made(tmp_path, maker, FixedShard(1, 2))
    assert maker.made[0] == 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no arrow" * 100),
        lambda path: shutil.copy(path.with_name("000-of-005.arrow"), path) and path.write_bytes(b"\0" * 2000),
    ],
)
def test_a_file_that_is_not_whole_is_named_and_made_again(tmp_path, caplog, damage):
    made(tmp_path)
    path = tmp_path / "003-of-005.arrow"
    damage(path)
    maker = Maker()
    assert_right(made(tmp_path, maker))
    assert maker.made == list(range(12, 16))
    assert caplog.messages == [f"{path} is damaged and will be made again"]


def test_a_flipped_bit_is_noticed_when_its_row_is_read_and_the_file_made_again(tmp_path, caplog):
    made(tmp_path)
    path = tmp_path / "003-of-005.arrow"
    stored = content(13)["number"].view(torch.uint8).numpy().tobytes()
    assert path.read_bytes().count(stored) == 1
    path.write_bytes(path.read_bytes().replace(stored, bytes([stored[0] ^ 1]) + stored[1:]))
    maker = Maker()
    rows = made(tmp_path, maker)
    assert maker.made == []
    assert_right(rows)
    assert maker.made == list(range(12, 16))
    assert caplog.messages == [f"{path} is damaged and will be made again"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"still to be written, 1e-06 GB are free; free some space, set AGSM_RL_CACHE"):
        made(tmp_path)
    assert not files(tmp_path)


def test_a_disk_that_fills_up_leaves_what_was_made(tmp_path):
    def large(numbers):
        return [{"x": torch.zeros(50_000 if number >= 8 else 5)} for number in numbers]

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"002-of-005.arrow: it cannot be written \(File too large\); what was made"
        ):
            made(tmp_path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == ["000-of-005.arrow", "001-of-005.arrow"]
    assert not list(tmp_path.glob("*.partial"))

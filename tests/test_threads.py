"""How many threads commands compute with: free cores, control groups, and what the user fixed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from agsm_rl import threads
from agsm_rl.errors import UserError
from agsm_rl.threads import FreeCores, Reading, control_groups, idle_seconds, is_followed, quota, wanted
from agsm_rl.training import free_memory as free_memory_module

STAT = """cpu  300 0 0 5000 50 0 0 0 0 0
cpu0 100 0 0 2000 20 0 0 0 0 0
cpu1 100 0 0 2000 20 0 0 0 0 0
cpu2 100 0 0 1000 10 0 0 0 0 0
intr 1 2 3
"""


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nothing is said about threads."""
    for name in (*threads.NUMBERS, threads.MODE, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def followed(cores: FreeCores, free: list[float]) -> list[int]:
    """The number of threads after each window in which so many cores were free on average."""
    numbers, wall, idle = [], 0.0, 0.0
    for mean in free:
        wall, idle = wall + 1, idle + mean
        cores.look(Reading(wall, own=0.0, idle=idle))
        numbers.append(cores.threads)
    return numbers


@pytest.mark.parametrize(
    ("now", "free", "number"),
    [(2, 2.0, 2), (2, 1.8, 2), (2, 1.3, 1), (2, 0.2, 1), (1, 1.0, 1), (1, 1.5, 1), (1, 1.95, 2), (64, 62.98, 63)],
)
def test_as_many_threads_as_cores_are_free(now: int, free: float, number: int) -> None:
    assert wanted(now, 64, free) == number


def test_never_more_threads_than_allowed() -> None:
    assert wanted(1, 2, 7.9) == 2


def test_free_cores_are_those_that_this_process_used_and_those_that_nobody_did() -> None:
    assert Reading(3.0, own=5.0, idle=9.0).free_since(Reading(1.0, own=2.5, idle=8.5)) == 1.5


def test_a_short_burst_of_another_process_changes_nothing() -> None:
    assert followed(FreeCores(2, Reading(0, 0, 0)), [2, 1, 2, 1, 2]) == [2, 2, 2, 2, 2]


def test_threads_step_down_beside_a_busy_process_and_back_when_it_is_gone() -> None:
    windows = [2, 1, 1, 1] + [2] * 6
    assert followed(FreeCores(2, Reading(0, 0, 0)), windows) == [2, 2, 1, 1, 1, 1, 1, 1, 1, 2]


def test_a_core_that_is_free_for_a_moment_is_not_taken_back() -> None:
    assert followed(FreeCores(2, Reading(0, 0, 0)), [1, 1, 2, 2, 2, 2, 2, 1, 2, 2]) == [2] + [1] * 9


def test_the_first_window_decides_by_itself() -> None:
    cores = FreeCores(4, Reading(0, 0, 0))
    assert cores.look(Reading(1, own=1, idle=1), at_once=True) and cores.threads == 2


def test_two_readings_within_a_window_are_not_compared() -> None:
    cores = FreeCores(2, Reading(0, 0, 0))
    assert not cores.look(Reading(threads.WINDOW / 2, 0, 0), at_once=True) and cores.threads == 2


def test_idle_time_is_that_of_the_cores_that_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    tick = os.sysconf("SC_CLK_TCK")
    assert idle_seconds(frozenset({0, 2}), tmp_path / "stat") == (2020 + 1010) / tick


@pytest.mark.parametrize("text", ["", "cpu  1 2 3\n", "cpu0 a b c d e\n", "cpu0 0 0 0 0 0 0\n"])
def test_a_system_that_does_not_say_what_is_idle_is_not_followed(tmp_path: Path, text: str) -> None:
    (tmp_path / "stat").write_text(text)
    assert idle_seconds(frozenset({0}), tmp_path / "stat") is None
    assert idle_seconds(frozenset({0}), tmp_path / "missing") is None


def test_the_quota_is_the_smallest_of_the_groups_around_the_process(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/pod/box\n")
    box = tmp_path / "cgroup" / "pod" / "box"
    box.mkdir(parents=True)
    (box / "cpu.max").write_text("max 100000\n")
    (box.parent / "cpu.max").write_text("250000 100000\n")
    assert quota(tmp_path / "cgroup", tmp_path / "membership") == 2.5


def test_the_quota_of_the_first_version_of_control_groups_is_read(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("4:memory:/m\n3:cpu,cpuacct:/box\n")
    box = tmp_path / "cgroup" / "cpu" / "box"
    box.mkdir(parents=True)
    (box / "cpu.cfs_quota_us").write_text("400000\n")
    (box / "cpu.cfs_period_us").write_text("100000\n")
    (box.parent / "cpu.cfs_quota_us").write_text("-1\n")
    (box.parent / "cpu.cfs_period_us").write_text("100000\n")
    assert quota(tmp_path / "cgroup", tmp_path / "membership") == 4.0


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        (
            "0::/job/step\n",
            {
                "job/memory.max": "1000",
                "job/memory.current": "900",
                "job/memory.stat": "anon 300\ninactive_file 500\n",
                "job/step/memory.max": "max",
            },
        ),
        (
            "5:memory:/job\n4:cpu:/other\n",
            {"memory/job/memory.limit_in_bytes": "900", "memory/job/memory.usage_in_bytes": "300"},
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_what_the_groups_around_a_process_leave_of_memory_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str]
) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    groups = partial(control_groups, root=tmp_path, membership=tmp_path / "membership")
    monkeypatch.setattr(free_memory_module, "control_groups", groups)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory_module.free_memory(torch.device("cpu")) == 600


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert quota(tmp_path, tmp_path / "missing") >= sys.maxsize


def test_a_number_that_the_user_gives_is_kept(no_settings: pytest.MonkeyPatch) -> None:
    assert is_followed()
    no_settings.setenv("OMP_NUM_THREADS", "2")
    assert not is_followed()
    no_settings.setenv(threads.MODE, "auto")
    assert is_followed()


def test_under_a_launcher_its_number_is_a_limit(no_settings: pytest.MonkeyPatch) -> None:
    no_settings.setenv("OMP_NUM_THREADS", "2")
    no_settings.setenv("LOCAL_RANK", "0")
    assert is_followed()
    no_settings.setenv(threads.MODE, "fixed")
    assert not is_followed()


def test_another_mode_is_refused(no_settings: pytest.MonkeyPatch) -> None:
    no_settings.setenv(threads.MODE, "4")
    with pytest.raises(UserError, match="AGSM_RL_THREADS: got '4'; write auto .* or fixed"):
        is_followed()


@pytest.fixture
def two_busy_cores() -> Iterator[None]:
    """Two threads on two cores, on each of which another process counts; skips where there is one core."""
    cores, before = threads.allowed_cores(), torch.get_num_threads()
    if len(cores) < 2:
        pytest.skip("one core")
    os.sched_setaffinity(0, sorted(cores)[:2])
    torch.set_num_threads(2)
    counting = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2)]
    try:
        yield
    finally:
        for process in counting:
            process.kill()
            process.wait()
        torch.set_num_threads(before)
        os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("two_busy_cores")
def test_beside_busy_processes_torch_computes_with_one_thread(
    no_settings: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_settings.setattr(threads, "WINDOW", 0.2)
    no_settings.setattr(threads, "_has_told", False)
    threads.follow_free_cores()
    try:
        for _ in range(3):
            time.sleep(1.1 * threads.WINDOW)
            threads.adjust()
    finally:
        no_settings.setenv(threads.MODE, "fixed")
        threads.follow_free_cores()
    assert torch.get_num_threads() == 1
    assert [record.getMessage()[:37] for record in caplog.records] == ["other processes take this machine's c"]


def test_a_command_that_computes_on_held_threads_never_changes_them(no_settings: pytest.MonkeyPatch) -> None:
    threads.follow_free_cores()
    try:
        threads.hold()
        assert threads._next_look == float("inf")
    finally:
        no_settings.setenv(threads.MODE, "fixed")
        threads.follow_free_cores()


def test_idle_threads_spin_for_a_short_time_unless_the_user_says_otherwise() -> None:
    def spins(**settings: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        show = "import agsm_rl, os; print(os.environ.get('GOMP_SPINCOUNT'))"
        return subprocess.run([sys.executable, "-c", show], env=kept | settings, capture_output=True, text=True).stdout

    assert int(spins()) <= 20_000
    assert spins(OMP_WAIT_POLICY="PASSIVE") == "None\n"
    assert spins(GOMP_SPINCOUNT="7") == "7\n"

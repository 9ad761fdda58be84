"""Workers end with the run that started them, whatever it or they are doing."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from running_workers import WORKERS, images


def alive(pid):
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: it was reaped between opening and reading
        return False


def gone(pid, within):
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_closing_ends_the_worker_with_its_children(script):
    reward = script("""
        import os, subprocess
        class Parent:
            def __call__(self, images, prompts):
                self.child = subprocess.Popen(["sleep", "600"])
                return [float(self.child.pid), float(os.getpid())]
        serve(Parent)
    """)
    pids = [int(pid) for pid in reward(images(), ["", ""])]
    assert all(alive(pid) for pid in pids)
    reward.close()
    assert all(gone(pid, 5) for pid in pids)


HANGS = {
    "in an import": "import time; time.sleep(600)",
    "in native code": "import re; re.fullmatch('(a+)+b', 'a' * 60)",
    "deaf to signals": "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(600)",
    "with a child": "import subprocess; subprocess.run(['sleep', '600'])",
}


@pytest.mark.parametrize("place", HANGS)
def test_no_worker_outlives_a_killed_run_wherever_it_hangs_before_it_listens(tmp_path, place):
    (tmp_path / "hangs.py").write_text(HANGS[place])
    code = f"""
        import threading, time, torch
        from agsm_rl_rewards.worker.reward import WorkerReward
        reward = WorkerReward(script={str(tmp_path / "hangs.py")!r})
        threading.Thread(target=reward, args=(torch.zeros(1, 3, 2, 2), ["a"]), daemon=True).start()
        while reward._link.pid is None: time.sleep(0.01)
        print(reward._link.pid, flush=True)
        time.sleep(600)
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    time.sleep(0.3)
    processes = [worker, *children(worker), *children(run.pid)]
    assert len(processes) >= 3 and all(alive(pid) for pid in processes)
    run.kill()
    run.wait()
    run.stdout.close()
    assert all(gone(pid, 15) for pid in processes)


def children(pid):
    """The processes that this one has started."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def test_a_fork_that_holds_the_watchdogs_pipe_does_not_keep_workers_alive(tmp_path):
    code = """
        import os, time, subprocess
        from agsm_rl_rewards.worker import watchdog
        worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
        watchdog.watch(worker.pid)
        if os.fork() == 0:
            os.setsid()
            time.sleep(30)
            os._exit(0)
        print(worker.pid, flush=True)
        time.sleep(600)
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    assert alive(worker)
    run.kill()
    run.wait()
    run.stdout.close()
    assert gone(worker, 15)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["right:0", "hang:0"])
def test_no_worker_outlives_a_killed_run_even_one_that_hangs(tmp_path, prompt):
    code = f"""
        import sys, threading, time, torch
        from agsm_rl_rewards.worker.reward import WorkerReward
        reward = WorkerReward(command=[sys.executable, {str(WORKERS / "faulty.py")!r}, {str(tmp_path)!r}])
        threading.Thread(target=reward, args=(torch.zeros(1, 3, 2, 2), [{prompt!r}]), daemon=True).start()
        while reward._link.pid is None: time.sleep(0.01)
        print(reward._link.pid, flush=True)
        time.sleep(600)
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    pid = int(run.stdout.readline())
    while not (tmp_path / "0").exists():
        time.sleep(0.02)
    run.kill()
    run.wait()
    assert gone(pid, 15)

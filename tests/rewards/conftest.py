"""The native rewards with tiny weights, and a reward that is served."""

import sys
import textwrap
import threading
import time
from typing import Any

import pytest
from agsm_rl_rewards.worker.http_client import TOKEN_VARIABLE
from agsm_rl_rewards.worker.http_server import FrameServer, Limits, listen
from agsm_rl_rewards.worker.reward import WorkerReward
from http_serving import TOKEN
from running_workers import QUICK, WORKERS
from tiny_rewards import TINY


@pytest.fixture(scope="session")
def tiny_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each native reward's options, with which it finds tiny weights in its official layout."""
    return {name: save(tmp_path_factory.mktemp(name)) for name, (_, save) in TINY.items()}


@pytest.fixture
def make_reward(tiny_options):
    """A tiny native reward by name, with further options."""
    return lambda name, **options: TINY[name][0](**(tiny_options[name] | options))


@pytest.fixture(params=list(TINY))
def each_reward(request, make_reward):
    """Each native reward in turn."""
    return make_reward(request.param)


@pytest.fixture
def serve(monkeypatch):
    """Serve a reward in a thread; gives the address. The client's token is set."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    running = []

    def start(reward, **limits):
        listening = listen("127.0.0.1", 0)
        server = FrameServer(reward, token=TOKEN, limits=Limits(**limits)).uvicorn()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.005)
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture
def closing():
    """Rewards that are closed in the end."""
    made = []
    yield lambda reward: made.append(reward) or reward
    for reward in made:
        reward.close()


@pytest.fixture
def faulty(tmp_path, closing):
    """The worker that fails as its prompts say."""
    command = [sys.executable, str(WORKERS / "faulty.py"), str(tmp_path)]
    return lambda **how: closing(WorkerReward(command=command, **(QUICK | how)))


@pytest.fixture
def script(tmp_path, closing):
    """A reward by a script of the given text."""

    def make(text, **how):
        path = tmp_path / "my_reward.py"
        path.write_text("from agsm_rl_worker import Refused, serve\n" + textwrap.dedent(text))
        return closing(WorkerReward(script=str(path), **(QUICK | how)))

    return make

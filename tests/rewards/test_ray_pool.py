"""A reward on several Ray actors scores as it does here, and goes on when an actor dies."""

import ipaddress
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import psutil
import pytest
import torch
from agsm_rl_rewards.jpeg import JpegCompressibility
from agsm_rl_rewards.worker import ray_cluster, ray_pool
from agsm_rl_rewards.worker.ray_cluster import start_ray
from agsm_rl_rewards.worker.ray_pool import ActorLink, RayPoolReward

from agsm_rl.errors import UserError


def test_what_cannot_be_pooled_is_told_before_ray_starts(monkeypatch):
    with pytest.raises(UserError, match="'os:system' is not a registered name"):
        RayPoolReward(reward="os:system")
    with pytest.raises(UserError, match="Did you mean 'shapes'"):
        RayPoolReward(reward="shapez")
    with pytest.raises(UserError, match="workers must be 1 or more; got 0"):
        RayPoolReward(reward="shapes", workers=0)
    with pytest.raises(UserError, match="'kind' is not a verdict"):
        RayPoolReward(reward="shapes", options={"verdict": "kind"})
    with pytest.raises(UserError, match="options of 'shapes'.*verdcit"):
        RayPoolReward(reward="shapes", options={"verdcit": "strict"})


def test_a_pool_needs_leave_for_what_its_reward_does_and_for_a_cluster():
    inner = {"reward": "worker", "options": {"command": ["python", "a b.py"]}}
    assert RayPoolReward.permissions(inner) == ["command:python 'a b.py'"]
    assert RayPoolReward.permissions({"reward": "shapes", "address": "ray://x:1"}) == ["host:ray://x:1"]
    assert RayPoolReward.permissions({"reward": "shapes", "options": None, "address": None}) == []


def test_links_that_are_opened_at_once_start_ray_once(monkeypatch):
    started = threading.Event()
    ray = MagicMock(is_initialized=started.is_set)

    def start(address, *, who):
        assert not started.is_set()
        time.sleep(0.05)
        started.set()

    monkeypatch.setattr(ray_pool, "_ray", lambda: ray)
    monkeypatch.setattr(ray_pool, "start_ray", start)
    links = [ActorLink("shapes", {}, address=None, resources={}) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ActorLink.open, links))
    assert all(link.is_open for link in links)


@pytest.fixture(scope="module")
def local_ray():
    ray = pytest.importorskip("ray")
    start_ray(who="test")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_batch_is_shared_and_scored_as_here_and_survives_a_killed_actor(local_ray):
    images = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    expected = JpegCompressibility()(images, [""] * 5)
    pool = RayPoolReward(reward="jpeg_compressibility", workers=2, num_cpus=0.1, retries=2, backoff=0.001)
    assert pool.name == "jpeg_compressibility"
    assert torch.equal(pool(images, [""] * 5), expected)
    assert torch.equal(pool(images[:1], [""]), expected[:1])
    pids = [local_ray.get(link._actor.__ray_call__.remote(lambda actor: os.getpid())) for link in pool._links]
    assert len({*pids, os.getpid()}) == 3
    os.kill(pids[0], signal.SIGKILL)
    assert torch.equal(pool(images, [""] * 5), expected)
    pool.close()


@pytest.mark.slow
def test_workers_import_nothing_from_the_current_folder(local_ray):
    folders = local_ray.get(local_ray.remote(lambda: sys.path).options(num_cpus=0.1).remote())
    assert os.getcwd() not in folders and "" not in folders


@pytest.mark.slow
def test_a_mistake_over_there_is_told_as_here(local_ray):
    pool = RayPoolReward(reward="shapes", workers=1, num_cpus=0.1, retries=0)
    with pytest.raises(UserError, match="reward 'shapes': .*not a prompt|nonsense"):
        pool(torch.rand(1, 3, 32, 32), ["nonsense"])
    pool.close()


STARTS_RAY = """
import json, os, signal, sys, threading, time
from agsm_rl_rewards.worker.ray_pool import RayPoolReward
import psutil, torch

handled = []
signal.signal(signal.SIGTERM, lambda *_: handled.append("SIGTERM"))
pool = RayPoolReward(reward="sharpness", workers=1, num_cpus=0.1)
pool(torch.rand(1, 3, 8, 8), ["a"])  # Ray is started in a thread of the pool
os.kill(os.getpid(), signal.SIGTERM)
while not handled:
    time.sleep(0.01)
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
ports = [item for member in family for item in member.net_connections("tcp") if item.status == psutil.CONN_LISTEN]
addresses = sorted({item.laddr.ip.removeprefix("::ffff:") for item in ports})
processes = [member.pid for member in family[1:]]
print(json.dumps({"addresses": addresses, "processes": processes}), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_ray_keeps_to_loopback_leaves_signals_and_the_home_folder_alone_and_ends_with_a_killed_run(tmp_path):
    pytest.importorskip("ray")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.Popen(
        [sys.executable, "-c", STARTS_RAY],
        env=clean | {"HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    told = json.loads(run.stdout.readline())
    assert told["addresses"] and all(ipaddress.ip_address(address).is_loopback for address in told["addresses"])
    assert len(told["processes"]) >= 4
    assert not (tmp_path / ".ray").exists()
    run.kill()
    run.wait()
    run.stdout.close()
    end = time.monotonic() + 20  # Ray's agents would notice after a minute or two by themselves
    while any(map(runs, told["processes"])) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(runs, told["processes"]))


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_ray_that_would_listen_on_the_network_is_ended_and_refused(monkeypatch):
    constants = MagicMock(ENABLE_RAY_CLUSTER=True)
    ray = MagicMock(__version__="9.0", util=MagicMock(get_node_ip_address=lambda: "192.0.2.7"))
    monkeypatch.setattr(ray_cluster, "import_ray", lambda who: ray)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray._private", MagicMock(ray_constants=constants))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="who: Ray 9.0 would listen on 192.0.2.7, where other machines can reach it"):
        start_ray(who="who")
    assert ray.shutdown.called and constants.ENABLE_RAY_CLUSTER and ray_cluster.LOCAL_ONLY not in os.environ

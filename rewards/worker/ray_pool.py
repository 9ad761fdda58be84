"""`ray_pool`: a registered reward on several Ray actors that share each batch, on one machine or a cluster.

    rewards: {ray_pool: {reward: hpsv2_official, options: {version: "2.1"}, workers: 4, num_gpus: 1}}

Needs `pip install 'agsm-rl[ray]'`. Actors speak the worker's frames, so they are checked like any other worker.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from agsm_rl_rewards.worker.ray_cluster import import_ray, start_ray
from agsm_rl_rewards.worker.remote import Fault, RemoteReward, check_images
from agsm_rl_rewards.worker.served import Served
from agsm_rl_rewards.worker_side.agsm_rl_worker import Buffer, Endpoint, Frame, ProtocolError, decode
from torch import Tensor

from agsm_rl import registry
from agsm_rl.errors import UserError

WHO = "reward 'ray_pool'"
_starting = threading.Lock()


class RewardActor:
    """Runs on Ray: makes the reward and answers frames."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.endpoint = Endpoint(lambda: Served(_reward_class(name)(**options)))

    def answer(self, question: bytes) -> bytes:
        """The answer to a frame."""
        return b"".join(self.endpoint.answer(decode(question)))


class ActorLink:
    """The link to one actor; a new actor replaces one that died or was too slow."""

    def __init__(self, name: str, options: dict[str, Any], *, address: str | None, resources: dict[str, float]) -> None:
        self._name, self._options, self._address, self._resources = name, options, address, resources
        self._actor: Any = None

    @property
    def is_open(self) -> bool:
        return self._actor is not None

    def open(self) -> None:
        ray = _ray()
        with _starting:  # the links of a pool are opened at the same time
            if not ray.is_initialized():
                start_ray(self._address, who=WHO)
        self._actor = ray.remote(RewardActor).options(**self._resources).remote(self._name, self._options)

    def ask(self, parts: Sequence[Buffer], *, timeout: float, max_body: int) -> Frame:
        ray = _ray()
        try:
            answer = ray.get(self._actor.answer.remote(b"".join(parts)), timeout=timeout)
            return decode(answer, max_body=max_body)
        except ray.exceptions.GetTimeoutError as error:
            raise Fault(f"no answer within {timeout:.3g} s") from error
        except (ray.exceptions.RayError, ProtocolError) as error:
            raise Fault(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}") from error

    def close(self) -> None:
        if self._actor is not None and _ray().is_initialized():
            _ray().kill(self._actor)
        self._actor = None

    def last_words(self) -> str:
        return ""


class RayPoolReward:
    """A registered reward on several Ray actors: scores [B], each actor scoring a part of the batch.

    Args:
        reward: Name of a registered reward.
        options: Constructor arguments of the reward.
        workers: Number of actors.
        num_cpus, num_gpus: CPUs and GPUs that Ray sets aside for each actor.
        address: Address of a running Ray. Null: the one in RAY_ADDRESS, or else a new one on this machine.
        timeout: Seconds for the scores of one batch.
        start_timeout: Seconds for the worker to load what it needs.
        retries: How often a batch is tried again after a crash, a hang or an invalid answer.
        backoff: Seconds before the first further try, doubled each time, one minute at most.
    """

    name = "ray_pool"
    differentiable = False
    elsewhere = True
    takes_metadata = True

    def __init__(
        self,
        *,
        reward: str,
        options: dict[str, Any] | None = None,
        workers: int = 2,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        address: str | None = None,
        timeout: float = 300.0,
        start_timeout: float = 600.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        if workers < 1:
            raise UserError(f"reward 'ray_pool': workers must be 1 or more; got {workers}")
        kind = _reward_class(reward)
        try:
            made = kind(**(options or {}))  # checks the options; nothing is loaded
        except TypeError as error:
            raise UserError(f"reward 'ray_pool': options of '{reward}': {error}") from error
        _ray()
        self.name, self.range = f"{made.name}", made.range
        resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        how = {"timeout": timeout, "start_timeout": start_timeout, "retries": retries, "backoff": backoff}
        self._links = [ActorLink(reward, options or {}, address=address, resources=resources) for _ in range(workers)]
        self._workers = [RemoteReward(link, name=self.name, **how) for link in self._links]
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="ray_pool")

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [B]; each worker takes its share of the images, with their prompts and metadata."""
        check_images(self.name, images, prompts)
        rows = [part for part in torch.arange(len(prompts)).tensor_split(len(self._workers)) if len(part)]
        parts = [
            (
                images[part],
                [prompts[row] for row in part.tolist()],
                None if metadata is None else [metadata[row] for row in part.tolist()],
            )
            for part in rows
        ]
        done = [
            self._threads.submit(partial(worker, *part)) for worker, part in zip(self._workers, parts, strict=False)
        ]
        return torch.cat([part.result() for part in done])

    def close(self) -> None:
        """End the actors; a later batch starts them again."""
        for worker in self._workers:
            worker.close()

    @staticmethod
    def permissions(options: Mapping[str, Any]) -> list[str]:
        """What the reward inside needs, and the address of a cluster."""
        kind = _reward_class(str(options["reward"]))
        inner = registry.permissions_needed(kind, options.get("options") or {})
        address = options.get("address")
        return [*inner, *([] if address in (None, "local") else [f"host:{address}"])]


def _reward_class(name: str) -> Any:
    if ":" in name:
        raise UserError(f"reward 'ray_pool': reward: '{name}' is not a registered name; see `agsm-rl list rewards`")
    return registry.load("rewards", name, where="reward 'ray_pool': reward")


def _ray() -> Any:
    return import_ray(WHO)

"""Tiny pipelines, and policies and sources on them, as fixtures; and one thread, so that results repeat bit for bit."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import pytest
import torch
from agsm_rl_rewards.brightness import Brightness
from tiny_pipelines import MAKERS, save_tiny

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.backbones.stable_diffusion_3 import StableDiffusion3
from agsm_rl.interfaces import Backbone
from agsm_rl.policy import Policy
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.rollouts import Rollouts
from agsm_rl.sources.step_preferences import StepPreferences


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory):
    """What runs keep between them stays out of the user's cache, also what fixtures of a module train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGSM_RL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def cache_of_its_own(session_cache, tmp_path_factory: pytest.TempPathFactory, request, monkeypatch):
    """No test reads what another one has kept."""
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{id(request.node)}"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in SD1.5's layout."""
    return save_tiny("sd15", tmp_path_factory.mktemp("tiny-sd15"))


@pytest.fixture(scope="session")
def tiny_xl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in SDXL's layout."""
    return save_tiny("sdxl", tmp_path_factory.mktemp("tiny-sdxl"))


@pytest.fixture(scope="session")
def tiny_sd3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in SD3's layout."""
    return save_tiny("sd3", tmp_path_factory.mktemp("tiny-sd3"))


CHECKPOINTS = {"sd15": "tiny_checkpoint", "sdxl": "tiny_xl_checkpoint", "sd3": "tiny_sd3_checkpoint"}


@pytest.fixture(params=list(MAKERS))
def each_checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each kind's pipeline folder in turn."""
    return request.getfixturevalue(CHECKPOINTS[request.param])


@pytest.fixture
def each_backbone(each_checkpoint: Path) -> Backbone:
    """Each kind's backbone in turn, with nothing attached."""
    return load_backbone(str(each_checkpoint), device="cpu")


@pytest.fixture
def xl_backbone(tiny_xl_checkpoint: Path) -> StableDiffusion:
    return StableDiffusion(str(tiny_xl_checkpoint), device="cpu")


@pytest.fixture
def sd3_backbone(tiny_sd3_checkpoint: Path) -> StableDiffusion3:
    return StableDiffusion3(str(tiny_sd3_checkpoint), device="cpu")


@pytest.fixture
def backbone(tiny_checkpoint: Path) -> StableDiffusion:
    """A fresh backbone, with nothing attached."""
    return StableDiffusion(str(tiny_checkpoint), device="cpu")


class OneProcess:
    """The only process of a run."""

    index, count = 0, 1

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture
def make_backbone(tiny_checkpoint: Path):
    return lambda: StableDiffusion(str(tiny_checkpoint), device="cpu")


@pytest.fixture
def make_adapters():
    """Two banks of soft tokens and of LoRA, from one seed."""
    return lambda: {"tokens": SoftTokens(num_tokens=2), "lora": LoRA(rank=2, banks=2)}


@pytest.fixture
def make_policy(make_backbone, make_adapters):
    """Policies with two banks of soft tokens and LoRA, all from one seed."""
    return lambda ema_decay=0.9: Policy(make_backbone(), make_adapters(), ema_decay=ema_decay)


@pytest.fixture
def policy(make_policy) -> Policy:
    return make_policy()


@pytest.fixture
def make_pairs():
    """A source of the shapes world's pairs, four at a time, drawn at the tiny backbone's size."""
    return lambda **options: Pairs("builtin:shapes", **({"batch_size": 4, "num_images": 24} | options))


@pytest.fixture
def make_rollouts(tmp_path: Path):
    """A source of 2 x 2 rollouts of 4 steps, rewarded by their brightness."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue circle\ntwo green squares\n")

    def make(*, bind: bool = False, **options) -> Rollouts:
        settings = {"prompts": str(prompts), "rewards": [(Brightness(), 1.0)], "num_prompts": 2}
        settings |= {"images_per_prompt": 2, "num_steps": 4, "guidance": 1.0}
        source = Rollouts(**(settings | options))
        if bind:
            source.bind("ddpo", 0, OneProcess())
        return source

    return make


@pytest.fixture
def rollouts(make_rollouts) -> Rollouts:
    return make_rollouts(bind=True)


@pytest.fixture
def make_step_preferences(tmp_path: Path):
    """A source of pairs for two prompts: 3 candidates at each of steps 1 to 3 of 4, compared by their brightness."""
    prompts = tmp_path / "step_prompts.txt"
    prompts.write_text("a red star\na blue circle\ntwo green squares\n")

    def make(*, bind: bool = False, shard=None, **options) -> StepPreferences:
        settings = {"prompts": str(prompts), "rewards": [(Brightness(), 1.0)], "num_prompts": 2, "threshold": 0.0}
        settings |= {"candidates": 3, "num_steps": 4, "first_step": 1, "guidance": 1.0}
        source = StepPreferences(**(settings | options))
        if bind:
            source.bind("spo", 0, shard or OneProcess())
        return source

    return make

"""The native rewards with tiny weights."""

from typing import Any

import pytest
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

"""What tests of several objectives share."""

import pytest
import torch


@pytest.fixture
def move():
    """Move a policy's parameters by small random numbers, so that it is not its base, nor its old policy."""

    def move(policy, *, by=0.05):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in policy.parameters().values():
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))

    return move

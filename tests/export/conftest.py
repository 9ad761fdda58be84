"""Exported adapters, as a run leaves them."""

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.export.attach import save_adapters


@pytest.fixture
def exported(each_backbone, tmp_path):
    """A run folder of each kind with soft tokens and LoRA of two banks."""
    adapters = {"tokens": SoftTokens(num_tokens=3), "lora": LoRA(rank=2, alpha=3.0, banks=2)}
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters.values():
        adapter.attach(each_backbone)
        for _, parameter in adapter.named_parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_adapters(adapters, tmp_path / "run" / "adapter", metadata={})
    return tmp_path / "run"

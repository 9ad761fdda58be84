"""Half precision on a CPU that can only compute it in software."""

import platform
from pathlib import Path

import pytest
import torch
from torch.optim import _muon

from agsm_rl.backbones import load_backbone
from agsm_rl.shapes.train_base.optimization import in_float32
from agsm_rl.training.precision import is_slow

CPU = torch.device("cpu")
TORCHS = _muon._zeropower_via_newtonschulz  # before anything replaces it


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)


def test_half_precision_is_slow_on_an_old_cpu_only(old_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_slow(torch.bfloat16, CPU) and is_slow(torch.float16, CPU)
    assert not is_slow(torch.float32, CPU) and not is_slow(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert not is_slow(torch.bfloat16, CPU) and is_slow(torch.float16, CPU)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert not is_slow(torch.float16, CPU)


def test_a_backbone_in_half_precision_says_that_it_will_be_slow(
    old_cpu: None, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_backbone(str(tiny_checkpoint), device="cpu", dtype="float32")
    assert "no instructions" not in caplog.text
    load_backbone(str(tiny_checkpoint), device="cpu", dtype="bfloat16")
    assert "backbone.dtype: bfloat16: this CPU has no instructions for bfloat16" in caplog.text
    assert "use float32 here" in caplog.text


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_muon_in_float32_is_torchs_within_bfloat16(shape: tuple[int, int]) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = ((_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C), 5, 1e-7)
    own, theirs = in_float32(grad, *settings), TORCHS(grad, *settings).float()
    assert own.shape == grad.shape
    assert float((own - theirs).norm() / theirs.norm()) < 0.03

"""Files of strangers and accidents: exit code 0 or 2, one printable message, nothing outside the folder.

Deterministic and short here; `python tests/fuzz/long_fuzz.py --minutes 30` draws new examples for as long as it is told
(docs/robustness.md has the counts of such a run).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making_runs import write_run
from odd_values import VALUES, changed, damaged
from safetensors.torch import save
from typer.testing import CliRunner, Result

from agsm_rl.cli import app
from agsm_rl.errors import UserError
from agsm_rl.export.attach import read_export
from agsm_rl.recipe import Recipe
from agsm_rl.run import checkpoints

RECIPE = {
    "seed": 0,
    "steps": 4,
    "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
    "adapters": {"tokens": {"use": "soft_tokens", "num_tokens": 4}, "lora": {"use": "lora", "rank": 2}},
    "ema": {"decay": 0.99},
    "sources": {
        "own": {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"brightness": 1.0}, "num_steps": 2}
    },
    "objectives": [
        {"use": "agsm", "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 8}, "trains": ["tokens"]},
        {"use": "ddpo", "source": "own", "weight": {0: 0.0, 10: 1.0}, "every": 2, "trains": ["lora"]},
    ],
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 1e-4},
    "evaluate": {"suite": "shapes", "every": 2, "num_images": 4, "rewards": ["brightness"]},
    "checkpoint": {"every": 2, "keep": 2, "best": "strict"},
    "sample": {"every": 100, "num_images": 2},
    "track": [],
}
LORA = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ADAPTER = {f"{LORA}.lora_A.weight": torch.ones(2, 4), f"{LORA}.lora_B.weight": torch.ones(4, 2)}
METADATA = {"kind": "lora", "name": "lora", "version": "0.1.0", "rank": "2", "alpha": "2", "banks": "1"}
TEXT_FILES = ("metrics.jsonl", "evaluations.jsonl", "eval.json", "recipe.yaml")
REVERSING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
PATIENT = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("quick", PATIENT, max_examples=40, derandomize=True)
settings.register_profile("long", PATIENT, max_examples=100, derandomize=False)
settings.load_profile(os.environ.get("FUZZ_PROFILE", "quick"))


@contextmanager
def nothing_outside(folder: Path) -> Iterator[None]:
    """Nothing beside `folder` changes within the block."""
    outside = folder.parent / f"{folder.name}-outside"
    outside.mkdir(exist_ok=True)
    (outside / "kept.txt").write_text("kept")
    before = sorted(path.name for path in folder.parent.iterdir())
    yield
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    assert [path.name for path in outside.iterdir()] == ["kept.txt"]
    assert (outside / "kept.txt").read_text() == "kept"


def check_message(message: str) -> None:
    """One message: no traceback, not endless."""
    assert message.strip()
    assert "Traceback" not in message
    assert len(message) < 20_000


def check_result(result: Result) -> None:
    """Exit code 0, or 2 with one message; nothing that steers a terminal."""
    assert result.exit_code in (0, 2), (result.exit_code, result.exception, result.output[-500:])
    if result.exit_code == 2:
        check_message(result.stderr or result.output)
    assert not [letter for letter in result.output if steers(letter) and letter not in "\n\t"]


def steers(letter: str) -> bool:
    """Whether a terminal acts on it: control characters, line separators, marks that reverse text."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(letter) in REVERSING


def check_refused_or_fine(call: Callable[[], Any]) -> None:
    """The call returns, or raises a UserError whose message can be shown."""
    try:
        call()
    except UserError as error:
        check_message(str(error))


def header_file(header: Any, data: bytes) -> bytes:
    """A safetensors file with any JSON as its header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@given(content=changed(RECIPE))
def test_a_recipe_with_odd_values_is_read_or_refused(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    folder.mkdir()
    with nothing_outside(folder):
        (folder / "r.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        check_refused_or_fine(lambda: Recipe.from_yaml(folder / "r.yaml"))


@given(content=damaged(yaml.safe_dump(RECIPE).encode()))
def test_a_recipe_with_damaged_bytes_is_read_or_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    file.write_bytes(content)
    check_refused_or_fine(lambda: Recipe.from_yaml(file))


@given(
    value=VALUES, key=st.sampled_from(["steps", "backbone.checkpoint", "objectives.0.weight", "sources.own.rewards"])
)
def test_a_changed_value_on_the_command_line_is_taken_or_refused(
    value: Any, key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    override = f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()}"
    check_refused_or_fine(lambda: Recipe.from_yaml(file, [override]))


@given(data=st.data(), name=st.sampled_from(TEXT_FILES), how=st.sampled_from(["bytes", "values"]))
def test_a_run_folder_with_an_odd_file_is_reported_or_refused(
    data: st.DataObject, name: str, how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = write_run(tmp_path_factory.mktemp("fuzz") / "run", steps=4, prompts=["one", "two"], images=1)
    file = run / name
    if how == "bytes" or name == "recipe.yaml":
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    elif name.endswith(".jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        odd = data.draw(changed(rows))
        lines = odd if isinstance(odd, list) else [odd]
        file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    else:
        file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())))), encoding="utf-8")
    with nothing_outside(run):
        check_result(CliRunner().invoke(app, ["report", str(run), "-o", str(run / "out.html")]))
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()


@given(header=changed(json.loads(save(ADAPTER, METADATA)[8 : 8 + struct.unpack("<Q", save(ADAPTER, METADATA)[:8])[0]])))
def test_an_adapter_with_an_odd_header_is_read_or_refused(
    header: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    folder.mkdir()
    file = folder / "lora.safetensors"
    file.write_bytes(header_file(header, torch.ones(16).numpy().tobytes()))
    with nothing_outside(folder):
        check_refused_or_fine(lambda: read_export(file))
        for form in ("kohya", "agsm-rl"):
            check_result(CliRunner().invoke(app, ["convert", str(file), str(folder / "o.safetensors"), "--to", form]))


@given(content=damaged(save(ADAPTER, METADATA)))
def test_an_adapter_with_damaged_bytes_is_read_or_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    folder.mkdir()
    file = folder / "lora.safetensors"
    file.write_bytes(content)
    with nothing_outside(folder):
        check_result(CliRunner().invoke(app, ["convert", str(file), str(folder / "o.safetensors"), "--to", "kohya"]))


@given(data=st.data(), whole_checksum=st.booleans())
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    data: st.DataObject, whole_checksum: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    checkpoints.save(folder, 1, {"step": 1, "policy": {"live": torch.ones(3)}})
    path = checkpoints.save(folder, 2, {"step": 2, "policy": {"live": torch.ones(3)}})
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    if whole_checksum:  # damaged on purpose, by somebody who wrote the checksum too
        path.with_suffix(".sha256").write_text(checkpoints._digest(path) + "\n")
    with nothing_outside(folder):
        check_refused_or_fine(lambda: checkpoints.newest(folder))

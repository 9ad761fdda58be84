"""What the cases share: a sound recipe on the tiny base, the command line in process, and what a refusal looks like."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from agsm_rl.cli.commands import app


@pytest.fixture
def command(tmp_path, monkeypatch) -> Callable[..., Any]:
    """Run `agsm-rl …` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def content(tiny_checkpoint) -> dict[str, Any]:
    """Score matching over LoRA: the least that trains."""
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 2, "num_images": 8}
    return {
        "steps": 2,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "objectives": [{"use": "score_matching", "source": pairs}],
        "sample": {"num_images": 1, "num_steps": 1},
        "track": [],
    }


@pytest.fixture
def train(command, tmp_path) -> Callable[..., Any]:
    """`agsm-rl train` of a recipe's content (or text, or bytes) into the folder `run`."""

    def run(content: Any, *more: str) -> Any:
        text = yaml.safe_dump(content) if isinstance(content, dict) else content
        (tmp_path / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return command("train", "x.yaml", "--run-dir", "run", *more)

    return run


def assert_refused(result: Any, *words: str, folder: Path | None = None) -> None:
    """Exit code 2, one message on stderr that holds the words, no traceback, and no run folder."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.splitlines()
    assert sum(line.startswith("agsm-rl: ") for line in lines) == 1, result.stderr
    assert "Traceback" not in result.output
    message = result.stderr[result.stderr.index("agsm-rl: ") :]
    assert len(message) < 1500, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert folder is None or not folder.exists(), sorted(folder.rglob("*"))


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 16), form: str = "PNG") -> bytes:
    """An image file."""
    file = BytesIO()
    Image.new(mode, size, 90 if mode in ("L", "P", "I;16") else None).save(file, form)
    return file.getvalue()

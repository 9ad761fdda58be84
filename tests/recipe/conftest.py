"""The data that the headers of shipped recipes ask the user for."""

from pathlib import Path

import pytest


@pytest.fixture
def users_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with it: images, a copy of COCO, pictures of the base, prompts. The hub may be asked."""
    for folder in ("photos", "data/coco_train2017", "data/base_images"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("prompts", "test_prompts", "coco_val_captions"):
        (tmp_path / "data" / f"{name}.txt").write_text("a red circle\n")
    (tmp_path / "data" / "train_metadata.jsonl").write_text('{"prompt": "a red circle"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

"""A recipe that is small enough for every command."""

import pytest
import yaml


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path):
    """mine.yaml in an empty folder: two steps of AGSM with a LoRA and soft tokens on a tiny base."""
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 16}
    content = {
        "steps": 2,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2, "banks": 2}, "tokens": {"use": "soft_tokens"}},
        "objectives": [{"use": "agsm", "source": pairs}],
        "track": [],
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path

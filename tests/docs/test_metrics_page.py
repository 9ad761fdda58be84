"""docs/metrics.md describes every metric that a run logs, and none that no run logs."""

import re
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from agsm_rl import registry
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.callbacks import MetricsWriter
from agsm_rl.run.folder import RunFolder

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
DRAWN = {
    "use": "rollouts",
    "prompts": "builtin:shapes-prompts",
    "rewards": {"brightness": 1.0},
    "num_prompts": 2,
    "images_per_prompt": 2,
    "num_steps": 3,
    "guidance": 1.0,
    "keep_means": True,
}
PAIRS = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 16}
STEPS = {
    **{key: value for key, value in DRAWN.items() if key not in ("images_per_prompt", "keep_means")},
    "use": "step_preferences",
    "candidates": 2,
    "first_step": 1,
    "threshold": 0.0,
}
REWARD_BACKPROP = {"rewards": {"sharpness": 1.0}, "num_steps": 2, "guidance": 1.0}
ON_OTHER_SOURCES = [
    {"use": "agsm", "source": PAIRS},
    {"use": "softrepa", "source": PAIRS},
    {"use": "score_matching", "source": PAIRS},
    {"use": "anchor", "source": "drawn", "view": {"use": "best_images"}},
    {"use": "ddpo", "source": "drawn"},
    {"use": "flow_grpo", "source": "drawn"},
    {"use": "grpo_guard", "source": "drawn"},
    {"use": "flow_dppo", "source": "drawn"},
    {"use": "opd", "source": "drawn", "guidance": 3.0},
    {"use": "diffusion_nft", "source": "drawn", "kl_weight": 1e-4},
    {"use": "spo", "source": STEPS},
    {"use": "awm", "source": "drawn"},
    {"use": "dgpo", "source": "drawn"},
    {"use": "crd", "source": "drawn"},
    {"use": "reward_backprop", "source": {"use": "prompts", "prompts": "builtin:shapes-prompts"}, **REWARD_BACKPROP},
]


def described(title: str) -> set[str]:
    """The names in the tables of a chapter and of those below it."""
    (chapter,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return set(re.findall(r"^\| `([^`]+)` \|", chapter, re.M))


STEP = described("Each step")
TERM = set().union(
    *map(
        described,
        [
            "Every term",
            "Every source",
            "AGSM",
            "SoftREPA",
            "Policy gradients",
            "OPD",
            "DiffusionNFT",
            "AWM",
            "DGPO",
            "CRD",
            "Diffusion-DPO and InPO",
            "SPO",
        ],
    )
)


def as_described(name: str, terms: list[str]) -> tuple[str, str]:
    """Where the page has a logged name, and how: with a placeholder for what the user named."""
    head, _, rest = name.partition("/")
    if head == "cosine":
        return "step", "cosine/<a>/<b>"
    if head == "learning_rate" and rest:
        return "step", "learning_rate/<adapter>"
    if head not in terms:
        return "step", name
    kind = rest.partition("/")[0]
    return "term", f"{kind}/<name>" if kind in ("reward", "reward_std") and "/" in rest else rest


@pytest.fixture
def logged(tiny_checkpoint, tmp_path_factory):
    """Train objectives for a few steps on the tiny base; the names that are logged, as the page has them."""

    def logged(objectives, **keys):
        content = {
            "steps": 2,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint)},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "objectives": objectives,
            **keys,
        }
        trainer = build_trainer(Recipe.from_data(content))
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        trainer.callbacks = [MetricsWriter(folder)]
        trainer.train()
        names = set(re.findall(r'"([^"]+)": ', folder.metrics.read_text(encoding="utf-8")))
        return {as_described(name, [term.name for term in trainer.terms]) for name in names}

    return logged


@pytest.fixture
def preferences(tmp_path):
    """Labelled preferences with one tie, and one picture that cannot be read."""
    import datasets

    def png(level):
        file = BytesIO()
        Image.new("RGB", (16, 16), (level,) * 3).save(file, "PNG")
        return file.getvalue()

    columns = {
        "caption": ["a", "b", "c", "d"],
        "jpg_0": [png(level) for level in (0, 1, 2, 3)],
        "jpg_1": [png(9), b"no picture", png(8), png(7)],
        "label_0": [1.0, 0.0, 0.5, 1.0],
    }
    path = tmp_path / "preferences.parquet"
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return {"use": "preferences", "dataset": str(path), "batch_size": 3}


def test_the_page_describes_what_runs_log_and_nothing_else(logged, preferences):
    objectives = [*ON_OTHER_SOURCES, *({"use": name, "source": preferences} for name in ("diffusion_dpo", "inpo"))]
    assert {term["use"] for term in objectives} == set(registry.BUILTIN["objectives"])
    names = logged(objectives, sources={"drawn": DRAWN}, optimizer={"learning_rate": 1e-5})
    one_image = DRAWN | {"num_prompts": 1, "images_per_prompt": 1}
    names |= logged(
        [{"use": "score_matching", "source": PAIRS, "weight": 1e45}, {"use": "ddpo", "source": one_image}],
        watch={"non_finite": "skip", "zero_variance": "skip"},
        optimizer={"learning_rate": {"lora": 1e-5}},
        weights={"balance": "gradient_norm"},
    )
    assert {name for place, name in names if place == "step"} == STEP
    assert {name for place, name in names if place == "term"} == TERM

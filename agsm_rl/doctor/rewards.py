"""Golden check of rewards: the scores of shipped images against stored ones; a reward without stored scores must at
least give a finite score an image, and not the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agsm_rl import registry
from agsm_rl.doctor.finding import Finding, green, red
from agsm_rl.recipe import Block, Recipe
from agsm_rl.resolve import Parts, reward_options
from agsm_rl.scoring import checked_score

GOLDEN = Path(__file__).parent / "golden"


def golden_images() -> tuple[Tensor, list[str]]:
    """Drawings of the shapes world that show their prompts, three that do not, and noise: [B, 3, 32, 32], prompts."""
    content = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    images, prompts = [], []
    for row in content["images"]:
        with Image.open(GOLDEN / row["file"]) as picture:
            images.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255)
        prompts.append(row["prompt"])
    return torch.stack(images), prompts


def stored_scores(target: str, options: Mapping[str, Any]) -> tuple[list[float], float] | None:
    """The scores of the golden images by a reward with these options, and their relative tolerance; None if unknown."""
    content = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    for row in content["rewards"]:
        if (row["target"], row["options"]) == (target, dict(options)):
            return row["scores"], row["tolerance"]
    return None


def configured_rewards(recipe: Recipe) -> dict[str, tuple[str, dict[str, Any]]]:
    """Place in the recipe → name and options, each reward with the same options once."""
    blocks: dict[str, Block] = {f"sources.{name}": block for name, block in recipe.sources.items()}
    for index, term in enumerate(recipe.objectives):
        blocks[f"objectives[{index}]"] = term
        if isinstance(term.source, Block):
            blocks[f"objectives[{index}].source"] = term.source
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, block in blocks.items():
        for name, value in (block.options.get("rewards") or {}).items():
            found[f"{place}.rewards.{name}"] = (name, reward_options(value))
    for index, name in enumerate(recipe.evaluate.rewards if recipe.evaluate else []):
        found[f"evaluate.rewards[{index}]"] = (name, {})
    once: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, one in found.items():
        if one not in once.values():
            once[place] = one
    return once


def check_rewards(recipe: Recipe, parts: Parts) -> Iterator[Finding]:
    """A finding for each configured reward."""
    rewards = configured_rewards(recipe)
    if not rewards:
        yield green("rewards", "the recipe has none")
    for place, (name, options) in rewards.items():
        yield _check(name, options, place, parts)


def _check(name: str, options: dict[str, Any], place: str, parts: Parts) -> Finding:
    what, (images, prompts) = f"reward '{name}' ({place})", golden_images()
    made: dict[str, Any] = parts.complete_rewards({name: options | {"weight": 1.0}}, place)[name]
    full = reward_options(made)
    try:
        scores = checked_score(parts.reward(name, place, full), images, prompts).detach().cpu()
    except Exception as error:
        return red(what, f"it fails on the golden images: {error}", "mend the reward, or take it out of the recipe")
    stored = stored_scores(registry.BUILTIN["rewards"].get(name, name), full)
    if stored is not None:
        wanted = torch.tensor(stored[0])
        allowed = stored[1] * wanted.abs().max()
        off = (scores - wanted).abs().max()
        if off > allowed:
            return red(
                what,
                f"its scores of the golden images differ by up to {off:.3g} from the stored ones",
                "compare the installed versions with constraints.txt: scores would not be comparable with others'",
            )
        return green(what, f"the {len(prompts)} golden images score as stored (differences up to {off:.1g})")
    if scores.max() == scores.min():
        return red(
            what,
            f"it gives {scores[0]:.4g} to all {len(prompts)} golden images, among them noise",
            "a reward that is constant teaches nothing: check its weights, its input range ([0, 1]) and its prompts",
        )
    return green(what, f"finite, and varies over the golden images ({scores.min():.4g} to {scores.max():.4g})")

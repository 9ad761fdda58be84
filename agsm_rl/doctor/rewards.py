"""Golden check of rewards: compare the scores of shipped images with stored ones.

A reward without stored scores must at least give each image a finite score, and not all images the same one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agsm_rl.doctor.finding import Finding, green, red
from agsm_rl.errors import UserError
from agsm_rl.interfaces import ChecksPrompts
from agsm_rl.term import Term
from agsm_rl.training.scoring import checked_score

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


def configured_rewards(terms: Sequence[Term]) -> list[Any]:
    """The rewards of the terms' objectives and sources, without duplicates (same class and options, if visible)."""
    owners: list[Any] = [owner for term in terms for owner in (term.source, term.objective)]
    rewards = [entry.reward for owner in owners for entry in owner.rewards]
    unique = {_identity(reward) if _shows_options(reward) else id(reward): reward for reward in rewards}
    return list(unique.values())


def check_rewards(rewards: Sequence[Any]) -> Iterator[Finding]:
    """One finding per reward."""
    if not rewards:
        yield green("rewards", "the recipe has none")
    for reward in rewards:
        yield _check(reward)


def _shows_options(reward: Any) -> bool:
    """Whether the reward stores all constructor arguments as attributes of the same names."""
    return vars(reward).keys() >= inspect.signature(type(reward)).parameters.keys()


def _identity(reward: Any) -> tuple[str, str]:
    """The reward's class and its constructor arguments, as far as it stores them as attributes."""
    kind = type(reward)
    names = [name for name in inspect.signature(kind).parameters if name in vars(reward)]
    return f"{kind.__module__}:{kind.__qualname__}", json.dumps(
        {name: getattr(reward, name) for name in names}, default=repr
    )


def _check(reward: Any) -> Finding:
    what, (images, prompts) = f"reward '{reward.name}'", golden_images()
    if isinstance(reward, ChecksPrompts):
        try:
            reward.check_prompts(prompts, [{} for _ in prompts])
        except UserError as error:
            return green(what, f"not checked on the golden images, whose prompts lack what it judges by ({error})")
    try:
        scores = checked_score(reward, images, prompts).detach().cpu()
    except Exception as error:
        return red(what, f"it fails on the golden images: {error}", "fix the reward, or remove it from the recipe")
    target, options = _identity(reward)
    stored = stored_scores(target, json.loads(options))
    if stored is not None:
        expected = torch.tensor(stored[0])
        off = (scores - expected).abs().max()
        if off > stored[1] * expected.abs().max():
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

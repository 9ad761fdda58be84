"""What a model draws for a suite at one guidance, and how it is judged; base against trained as eval.json has it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from agsm_rl.evaluate.drawing import draw
from agsm_rl.evaluate.suites.shapes import ShapesResult, compare, evaluate, suite_prompts
from agsm_rl.interfaces import Adapter, Reward
from agsm_rl.policy import using
from agsm_rl.recipe.rewards import SCORES
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.training.guidance import guiding
from agsm_rl.training.scoring import checked_score

SHOWN = 16
"""Images of a model that are kept for pictures: those of the suite's first prompts, not chosen ones."""


class Measured:
    """One model's verdicts, mean rewards and first images for a suite at one guidance.

    Args:
        guidance: Strength of classifier-free guidance.
        result: The suite's verdicts.
        rewards: Mean of each reward.
        images: The first images, [at most SHOWN, 3, H, W] in [0, 1].
        scores: Each reward's scores [N], one per image; None where the measurement was read from a file.
    """

    def __init__(
        self,
        guidance: float,
        result: ShapesResult,
        rewards: dict[str, float],
        images: Tensor,
        scores: dict[str, Tensor] | None = None,
    ) -> None:
        self.guidance, self.result, self.rewards, self.images = guidance, result, rewards, images
        self.scores = scores or {}

    def overall(self) -> dict[str, float]:
        """The suite's scores under the names of recipe.rewards.SCORES."""
        return {name: self.result.scores(strict=name == "strict").overall.value for name in SCORES}

    def means(self) -> dict[str, float]:
        """The suite's scores and the mean rewards, under the names that a recipe's rules use."""
        return self.overall() | self.rewards

    def figures(self) -> dict[str, float]:
        """The same under the names that are logged."""
        return self.overall() | {f"reward/{name}": value for name, value in self.rewards.items()}

    def to_json(self) -> dict[str, Any]:
        """The suite's content, with guidance and rewards."""
        return self.result.to_json() | {"guidance": self.guidance, "rewards": self.rewards}


Compared = tuple[Measured, Measured]
"""The base and the trained model at the same guidance."""


@contextmanager
def drawn_as(adapters: Collection[Adapter], options: Evaluate, *, where: str = "evaluate.") -> Iterator[None]:
    """Within the block, adapters draw with the bank and the form of guidance that an evaluation asks for."""
    with using(adapters, options.bank), guiding(adapters, options.guidance_bank, options.guidance_prompt, where=where):
        yield


def measure(
    backbone: Any,
    options: Evaluate,
    guidance: float,
    rewards: Mapping[str, Reward],
    *,
    check: Callable[[], None] = lambda: None,
) -> Measured:
    """Draw and judge the suite with the backbone as it is, adapters on or off; `check` is called before each batch."""
    prompts = suite_prompts(options.split, options.num_images, options.seed)
    batches: list[Tensor] = []

    def draw_batch(batch: list[str], seeds: list[int]) -> Tensor:
        check()
        images = draw(
            backbone,
            [prompt + options.prompt_suffix for prompt in batch],
            seeds,
            guidance=guidance,
            num_steps=options.num_steps,
            batch_size=options.batch_size,
        )
        batches.append(images)
        return images

    result = evaluate(draw_batch, prompts, seed=options.seed, batch_size=options.batch_size)
    images = torch.cat(batches)
    scores = {
        name: _scores(reward, images, prompts, name=name, batch_size=options.batch_size, device=backbone.device)
        for name, reward in rewards.items()
    }
    means = {name: float(score.mean()) for name, score in scores.items()}
    return Measured(guidance, result, means, images[:SHOWN], scores)


def _scores(
    reward: Reward, images: Tensor, prompts: list[str], *, name: str, batch_size: int, device: torch.device
) -> Tensor:
    """The reward of each image, [N] on the CPU."""
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    return torch.cat(
        [checked_score(reward, images[batch].to(device), prompts[batch], name=name).cpu() for batch in batches]
    )


def to_json(
    compared: list[Compared] | list[tuple[None, Measured]], options: Evaluate, *, step: int | None = None
) -> dict[str, Any]:
    """eval.json: the trained model at the first guidance on top, then base and difference, then other guidances."""
    entries = []
    for base, trained in compared:
        entry = trained.to_json()
        if base is not None:
            entry |= {"base": base.to_json(), "difference": asdict(compare(base.result, trained.result))}
        entries.append(entry)
    settings: dict[str, Any] = {"split": options.split, "seed": options.seed, "num_steps": options.num_steps}
    settings |= {"bank": options.bank, "prompt_suffix": options.prompt_suffix}
    form = {"guidance_bank": options.guidance_bank, "guidance_prompt": options.guidance_prompt}
    settings |= {key: value for key, value in form.items() if value is not None}
    settings |= {} if step is None else {"step": step}
    return entries[0] | settings | ({"other_guidances": entries[1:]} if entries[1:] else {})

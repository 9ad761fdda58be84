"""The judges of the drawn worlds as rewards: 1 for a drawing that shows its prompt and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from agsm_rl.errors import unknown_name
from agsm_rl.shapes.judge import Verdict, matching
from agsm_rl.shapes.scenes import Requirement
from agsm_rl.shapes.worlds import SCENES, SHAPES, World

Kind = Literal["strict", "lenient", "graded"]
WRONG_COLOR = 0.5
WRONG_PLACE = 0.5


class ShapesReward:
    """Whether an image of the shapes world shows its prompt: scores [B] by the judge's verdict.

    Raises UserError for a prompt that does not belong to the shapes world.

    Args:
        verdict: `strict`: 1 if the image shows exactly what the prompt asks for, else 0. `lenient`: 1 if it shows that,
            whatever else it shows; a model learns to add extras, so use it for comparison only. `graded`: denser, and 1
            exactly where `strict` is (see `graded_score`).
    """

    name = "shapes"
    world: ClassVar[World] = SHAPES
    range = (0.0, 1.0)
    licence = "Apache-2.0 (no weights)"
    differentiable = False

    def __init__(self, *, verdict: Kind = "strict") -> None:
        if verdict not in get_args(Kind):
            raise unknown_name(f"reward '{self.name}': verdict", verdict, "a verdict", get_args(Kind))
        self.verdict = verdict

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """UserError for a prompt outside the world, before anything is drawn."""
        for prompt in prompts:
            self.world.parse(prompt)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        scores = [self._score(image, self.world.parse(prompt)) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(self, image: Tensor, requirement: Requirement) -> float:
        verdict = self.world.judge(image, requirement)
        if self.verdict == "graded":
            return graded_score(verdict, requirement)
        return float(verdict.strict if self.verdict == "strict" else verdict.correct)


class ScenesReward(ShapesReward):
    """Whether an image of the scenes world shows its prompt: scores [B] by the judge's verdict.

    Raises UserError for a prompt that does not belong to the scenes world.

    Args:
        verdict: `strict`: 1 if the image shows exactly what the prompt asks for, else 0. `lenient`: 1 if it shows that,
            whatever else it shows; a model learns to add extras, so use it for comparison only. `graded`: denser, and 1
            exactly where `strict` is (see `graded_score`).
    """

    name = "scenes"
    world: ClassVar[World] = SCENES


def graded_score(verdict: Verdict, requirement: Requirement) -> float:
    """Objects drawn as asked over all objects asked for or drawn: |asked ∩ drawn| / |asked ∪ drawn|, in [0, 1].

    An object of the right shape and the wrong colour or size counts half; a wrong position or place halves the whole.
    Extra objects and unclean blobs enlarge the denominator, so that drawing more of everything never pays. 1 if and
    only if `strict`.
    """
    left = list(verdict.objects)
    credit = 0.0
    for group in requirement.groups:
        right = matching(group, left)[: group.count]
        left = [item for item in left if item not in right]
        wrong = [item for item in left if item.shape == group.shape][: group.count - len(right)]
        left = [item for item in left if item not in wrong]
        credit += len(right) + WRONG_COLOR * len(wrong)
    asked = sum(group.count for group in requirement.groups)
    score = credit / (asked + len(left) + len(verdict.rejected))
    misplaced = (requirement.relation or requirement.place) is not None and credit == asked and not verdict.correct
    return score * WRONG_PLACE if misplaced else score

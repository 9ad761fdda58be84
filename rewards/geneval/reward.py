"""`geneval`: GenEval's rules as a reward (arXiv 2310.11513), on what a detector finds in the image.

The prompts' file says what each image should show, in GenEval's form: see requirements.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from agsm_rl_rewards.geneval.detector import CLASSIFIER, DETECTOR, Detector, detections
from agsm_rl_rewards.geneval.exact import exact
from agsm_rl_rewards.geneval.requirements import classes_by_colour, fault, object_names, requirements
from agsm_rl_rewards.geneval.rules import GENEVAL, Detection, judge
from agsm_rl_rewards.preprocessing import pictures
from torch import Tensor

from agsm_rl.errors import UserError, unknown_name

Kind = Literal["fraction", "strict", "correct"]


class GenEvalReward:
    """Whether an image shows what its prompt asks for by GenEval's rules: scores [B].

    Raises UserError, with the command that downloads them, if the models are missing, and for a prompt whose row lacks
    GenEval's `tag` and `include`.

    Args:
        verdict: `fraction`: Flow-GRPO's training score, 1 if the image shows exactly what was asked for and less the
            more is wrong. `strict`: 1 where `fraction` asks for nothing more, else 0. `correct`: 1 where the suite
            `geneval` judges the image correct, which allows more objects than asked for unless `exclude` forbids them.
        detector: Folder or hub id of a Mask2Former trained on COCO instances.
        classifier: Folder or hub id of a CLIP, which tells colours.
    """

    name = "geneval"
    range = (2.0 - GENEVAL.max_objects, 1.0)
    licence = "MIT (rules and prompts), the models' own"
    differentiable = False
    takes_metadata = True

    def __init__(self, *, verdict: Kind = "fraction", detector: str = DETECTOR, classifier: str = CLASSIFIER) -> None:
        if verdict not in get_args(Kind):
            raise unknown_name("reward 'geneval': verdict", verdict, "a verdict", get_args(Kind))
        self.verdict, self.detector, self.classifier = verdict, detector, classifier
        self.range = GenEvalReward.range if verdict == "fraction" else (0.0, 1.0)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """UserError, naming the prompt, if a row does not say in GenEval's form what its image should show."""
        names = set(object_names())
        for prompt, row in zip(prompts, metadata, strict=True):
            if reason := fault(requirements(row), names):
                raise UserError(
                    f"reward 'geneval': the prompt '{prompt:.200}' {reason}; use a file of prompts in the form of "
                    "GenEval's evaluation_metadata.jsonl"
                )

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]; `metadata`: what each should show."""
        rows = [{}] * len(prompts) if metadata is None else metadata
        self.check_prompts(prompts, rows)
        detector, scores = self._models, []
        for picture, row in zip(pictures(images), rows, strict=True):
            asked = requirements(row)
            scores.append(self._score(detections(detector(picture, classes_by_colour(asked))), asked))
        return torch.tensor(scores, device=images.device)

    @cached_property
    def _models(self) -> Detector:
        return Detector(self.detector, self.classifier, options=("reward 'geneval': detector", "classifier"))

    def _score(self, seen: Sequence[Detection], asked: Mapping[str, Any]) -> float:
        if self.verdict == "correct":
            return float(judge(seen, asked).correct)
        verdict = exact(seen, asked)
        return verdict.fraction if self.verdict == "fraction" else float(verdict.correct)

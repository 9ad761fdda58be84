"""The editing suite: images are edited by text; did what should change, change, and did the rest stay?

On the shapes world both are judged exactly, object by object: `changed`, `kept`, and `overall`, which needs both. On a
list of your own (`prompts`: rows with `image`, `from` and `to`) the edit is scored by any rewards under its target
prompt, against the structure kept of its source: SSIM, and DINO's features where there are weights for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from agsm_rl.editing.editor import EditSettings, Method, edit
from agsm_rl.errors import UserError
from agsm_rl.evaluate.image_folder import sha256
from agsm_rl.evaluate.prompts import PromptList
from agsm_rl.evaluate.structure import Dino, like, ssim
from agsm_rl.evaluate.suite import Judged, Metadata, Part, Row, Suite
from agsm_rl.evaluate.suites.editing_result import EditingResult
from agsm_rl.evaluate.suites.rewards import Rewards
from agsm_rl.evaluate.suites.shapes import is_of_the_world
from agsm_rl.files import local_path
from agsm_rl.interfaces import Backbone
from agsm_rl.recipe.options import NumImages, Seed
from agsm_rl.recipe.reward_specs import RewardSpec
from agsm_rl.shapes import world
from agsm_rl.shapes.edits import ShapeEdit, draw_edits, judge_edit
from agsm_rl.shapes.world import Split
from agsm_rl.sources.latents import fit
from agsm_rl.sources.pictures import read_picture

NUM_EDITS = 200


class Editing(Suite):
    """Edits of images by text. Guidance under the target prompt and the number of steps are the evaluation's.

    Args:
        prompts: A list of edits (.jsonl, .csv, .parquet): the columns `image` (a path, relative to the list's folder),
            `from` and `to`. Null: edits of the shapes world.
        rewards: Rewards of the edited image under its target prompt, by name; a list needs one. A `weight` counts in
            a list's `overall` only.
        split: Shapes: target prompts of `train`, `validation` or `held_out`. Null: the evaluation's split, `held_out`
            by default.
        num_images: How many edits. Null: 200 of the shapes world, or one of each row of a list.
        seed: Seed of the shapes world's edits. Null: the evaluation's.
        method: `inversion` or `flowedit`. Null: FlowEdit for flow models, inversion for others.
        strength: Share of the steps that an edit goes through. Null: 1; FlowEdit 0.66.
        source_guidance: Guidance under the source prompt. Null: 1; FlowEdit 3.5.
        n_min: FlowEdit's last steps that draw in the ordinary way. Null: 0.
        n_avg: FlowEdit's noises that a step averages over. Null: 1.
        dino: A folder or a name on the hub of a DINOv2, such as facebook/dinov2-base. Null: SSIM is the only measure
            of structure.
        any_base: Shapes: also accept a base that was not trained on this world.
    """

    name = "editing"
    only_draws = frozenset({"seed", "method", "strength", "source_guidance", "n_min", "n_avg", "any_base"})

    def __init__(
        self,
        *,
        prompts: str | None = None,
        rewards: Sequence[RewardSpec] = (),
        split: Split | None = None,
        num_images: NumImages | None = None,
        seed: Seed | None = None,
        method: Method | None = None,
        strength: float | None = None,
        source_guidance: float | None = None,
        n_min: int | None = None,
        n_avg: int | None = None,
        dino: str | None = None,
        any_base: bool = False,
    ) -> None:
        if prompts is not None and not rewards:
            raise UserError(
                "suite editing: a list of edits is scored by rewards under its target prompts; name one or more as "
                "`rewards` (--reward)."
            )
        self.edits = PromptList(prompts, "to", None, num_images)
        self.split, self.seed, self.any_base, self.dino = split or "held_out", seed or 0, any_base, dino
        numbers = {"strength": strength, "source_guidance": source_guidance, "n_min": n_min, "n_avg": n_avg}
        self.settings = {"method": method} | numbers
        self.rewards = Rewards(rewards=rewards)
        own = {"overall", "changed", "kept", "reason", "ssim", "dino"}
        if taken := own.intersection(self.rewards.score_names()):
            raise UserError(f"suite editing: '{min(taken)}' is one of its own scores; give the reward another name.")

    @property
    def num_images(self) -> int:  # type: ignore[override]
        """The number given, or the default of the shapes world or of the list."""
        return self.edits.num_images or NUM_EDITS

    @property
    def of_the_world(self) -> bool:
        """Whether the edits are the shapes world's."""
        return self.edits.prompts is None

    @property
    def measures(self) -> list[str]:
        """The names of what is measured by a number."""
        return ["ssim", *(["dino"] if self.dino else []), *self.rewards.score_names()]

    def score_names(self) -> Sequence[str]:
        """Of the shapes world `overall`, `changed` and `kept`; of both the measures of structure, and the rewards."""
        return [*(("overall", "changed", "kept") if self.of_the_world else ()), *self.measures]

    def how(self) -> Mapping[str, Any]:
        """The judge of the structure."""
        return {"judge": "shapes edits" if self.of_the_world else "structure", "dino": self.dino}

    def parts(self) -> Sequence[Part]:
        """The verdict and the structure; and each reward."""
        return [Part(self.name, self.how(), self._judge), *self.rewards.parts()]

    def join(self, rows: Sequence[Row]) -> Row:
        """One mapping of all."""
        own, *scores = rows
        return {**own, **self.rewards.join(scores)}

    def judge(self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Row]:
        """The verdict on each image where there is one, and its measures."""
        rows = [part.judge(images, prompts, metadata) for part in self.parts()]
        return [self.join(row) for row in zip(*rows, strict=True)]

    def prompts(self) -> Mapping[int, Metadata]:
        """The target prompts, with what each edit starts from and how it is made."""
        return self._rows

    @cached_property
    def _rows(self) -> dict[int, Metadata]:
        if self.of_the_world:
            edits = draw_edits(self.split, self.num_images, self.seed)
            rows = [{"prompt": item.target, **item.to_json()} for item in edits]
        else:
            rows = [self._row(number, row) for number, row in self.edits.read().items()]
        # Among the metadata, so that kept images are not taken for edits with other settings.
        return {index: row | {"edit": self.settings} for index, row in enumerate(rows)}

    def _row(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of a list, with the image's path and hash."""
        where = f"{self.edits.prompts}, row {number + 1}"
        for key in ("image", "from"):
            if not isinstance(row.get(key), str):
                raise UserError(f"{where}: `{key}` is missing or not text; a list of edits has image, from and to.")
        folder = local_path(str(self.edits.prompts))
        image = (folder if folder.is_dir() else folder.parent) / local_path(row["image"])
        if not image.is_file():
            raise UserError(f"{where}: there is no image {image}; paths are relative to the list's folder.")
        return {**row, "image": str(image), "image_sha256": sha256(image)}

    def prepare(self) -> None:
        """Load the rewards and DINO."""
        if self.rewards.specs:
            self.rewards.prepare()
        if self.dino:
            assert self._dino

    @cached_property
    def _dino(self) -> Dino | None:
        return Dino(self.dino) if self.dino else None

    def check(self, metadata: Metadata) -> None:
        """UserError for a row that does not say what was edited, or lacks what one of the rewards judges by."""
        if self.of_the_world:
            ShapeEdit.from_json(metadata, str(metadata["prompt"]))
        elif not isinstance(metadata.get("image"), str):
            raise UserError("`image`, the source image's path, is missing.")
        self.rewards.check(metadata)

    def check_base(self, backbone: Mapping[str, Any]) -> None:
        """UserError where the shapes world's edits are asked of a base that was not trained on it."""
        if self.of_the_world and not self.any_base and backbone.get("checkpoint") and not is_of_the_world(backbone):
            raise UserError(
                f"the suite 'editing' edits drawings of the small shapes world, which '{backbone['checkpoint']}' was "
                "not trained on. Give a list of your own edits: prompts: edits.jsonl (--prompts edits.jsonl) with "
                "image, from and to in each row, and rewards; or any_base: true (--any-base)."
            )

    def draw(
        self,
        backbone: Backbone,
        prompts: Sequence[str],
        seeds: Sequence[int],
        metadata: Sequence[Metadata],
        *,
        guidance: float,
        num_steps: int,
    ) -> Tensor:
        """The edited images; what follows the target prompts (`prompt_suffix`) also follows the source prompts."""
        images = torch.stack([fit(self._source(row), backbone.resolution) for row in metadata])
        suffixes = [text.removeprefix(str(row["prompt"])) for text, row in zip(prompts, metadata, strict=True)]
        sources = [f"{row['from']}{suffix}" for row, suffix in zip(metadata, suffixes, strict=True)]
        settings = EditSettings(num_steps=num_steps, guidance=guidance, **self.settings)  # type: ignore[arg-type]
        return edit(backbone, images, sources, prompts, seeds=seeds, settings=settings)

    def _judge(self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[Row]:
        rows = []
        for image, prompt, row in zip(images, prompts, metadata, strict=True):
            source = like(self._source(row), image)
            found: dict[str, Any] = {"ssim": ssim(source, image)}
            if self._dino is not None:
                found["dino"] = self._dino.likeness(source, image)
            if self.of_the_world:
                found |= asdict(judge_edit(image, ShapeEdit.from_json(row, prompt)))
            rows.append(found)
        return rows

    def result(self, judged: Sequence[Judged]) -> EditingResult:
        """The rows in order, and what they are measured by."""
        weights = {spec.label: spec.weight for spec in self.rewards.specs}
        return EditingResult(tuple(judged), tuple(self.measures), weights, self.split if self.of_the_world else None)

    def _source(self, metadata: Metadata) -> Image:
        """The image that a row's edit starts from."""
        if self.of_the_world:
            return world.render(ShapeEdit.from_json(metadata, str(metadata["prompt"])).objects)
        return read_picture(Path(metadata["image"]), str(metadata["image"]))

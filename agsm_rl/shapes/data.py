"""A drawn world as `datasets`: image-caption pairs, prompts, preference pairs, and an image folder on disk.

Each row has its own generator, seeded by (seed, split, kind of data, row number): the first 100 of 2000 pairs are
the same as those of 100, and two splits never share a drawing. What a prompt asks for depends on how many there are.
"""

import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from PIL import Image

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.files import replacing, write_text
from agsm_rl.shapes.scenes import Requirement, Scene, Split
from agsm_rl.shapes.worlds import SHAPES, WORLDS, World

if TYPE_CHECKING:
    import datasets

PAIRS = {f"builtin:{name}": world for name, world in WORLDS.items()}
PROMPTS = {f"builtin:{name}-prompts": world for name, world in WORLDS.items()}
PREFERENCES = {f"builtin:{name}-preferences": world for name, world in WORLDS.items()}
"""The worlds by the names of their data sets."""

_SPLITS: tuple[str, ...] = get_args(Split)
_KINDS = ("pairs", "prompts", "preferences")


def pairs(split: str, num: int, seed: int, captions: str = "plain", world: World = SHAPES) -> "datasets.Dataset":
    """`num` rows of `image` and `caption`; the images are the same whatever the captions.

    `plain` captions are right and have no cue, `careful` ones are right and cued; `web` (shapes) and `mixed` (scenes)
    are what the base models were trained on. The scenes world also has `careless` ones, mostly wrong, and `coco`, which
    are true but leave things out. UserError for an unknown split or kind of captions.
    """
    if captions not in world.wordings:
        raise unknown_name(f"builtin:{world.name}", captions, "a kind of captions", world.wordings)
    rows = [_pair(world, split, seed, index, captions) for index in range(num)]
    columns = {"image": [_png(world.render(scene)) for scene, _ in rows], "caption": [caption for _, caption in rows]}
    import datasets  # here: who only asks for prompts need not wait for it

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


def prompts(split: str, num: int, seed: int, counting_share: float | None = None, world: World = SHAPES) -> list[str]:
    """`num` plain prompts, shared evenly over the six tags; of another share for counting, if given.

    The tags are interleaved, so that any stretch of the list is balanced as the whole is. Where a split's requirements
    are few and known, as in the scenes world but for training, each is asked for equally often.
    """
    worded, so_far = [], Counter[str]()
    for index, tag in enumerate(_spread(world, num, counting_share)):
        rng = _generator(split, seed, index, "prompts")
        listed = world.requirements_of(_split(split), tag)
        if listed:
            again, place = divmod(so_far[tag], len(listed))
            order = np.random.default_rng([seed, again, world.tags.index(tag)]).permutation(len(listed))
            requirement = listed[order[place]]
        else:
            requirement = world.draw_requirement(rng, _split(split), tag)
        so_far[tag] += 1
        worded.append(world.describe(requirement, rng))
    return worded


def preferences(split: str, num: int, seed: int, world: World = SHAPES) -> "datasets.Dataset":
    """`num` rows of `prompt`, `chosen` (a right drawing) and `rejected` (one of what a careless eye takes it for)."""
    columns: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for index in range(num):
        rng = _generator(split, seed, index, "preferences")
        requirement, wrong = _requirement_and_wrong(world, rng, split)
        columns["prompt"].append(world.describe(requirement, rng))
        for name, wanted in (("chosen", requirement), ("rejected", wrong)):
            columns[name].append(_png(world.render(_scene(world, rng, split, wanted))))
    import datasets  # here: who only asks for prompts need not wait for it

    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_image_folder(out: Path, split: str, num: int, seed: int, world: World = SHAPES) -> None:
    """Write one split as an ordinary image folder: PNG files and a metadata.jsonl of file_name, caption and tag.

    `datasets.load_dataset("imagefolder", data_dir=out)` and any trainer that knows that form read it. UserError if
    `out` exists and is not an empty folder, OSError naming the file that the disk refuses.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not an empty folder; give a new one, nothing is overwritten.")
    rows = [_pair(world, split, seed, index, "plain") for index in range(num)]
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (scene, caption) in enumerate(rows):
        name = f"{index:05d}.png"
        with replacing(out / name) as aside:
            world.render(scene).save(aside, format="PNG")
        lines.append(json.dumps({"file_name": name, "caption": caption, "tag": scene.requirement.tag}))
    write_text(out / "metadata.jsonl", "\n".join(lines) + "\n")


def _pair(world: World, split: str, seed: int, index: int, captions: str) -> tuple[Scene, str]:
    rng = _generator(split, seed, index, "pairs")
    scene = _scene(world, rng, split, world.draw_requirement(rng, _split(split)))
    return scene, world.wordings[captions](scene.requirement, rng)


def _scene(world: World, rng: np.random.Generator, split: str, requirement: Requirement) -> Scene:
    return world.draw_scene(rng, requirement, allow_unseen=split not in world.splits_seen)


def _requirement_and_wrong(world: World, rng: np.random.Generator, split: str) -> tuple[Requirement, Requirement]:
    """A requirement and a wrong reading of it; training sees no held-out thing in a rejected image either."""
    while True:
        requirement = world.draw_requirement(rng, _split(split))
        wrong = world.wrong_requirement(requirement)
        if split not in world.splits_seen or world.can_be_seen(wrong):
            return requirement, wrong


def _split(name: str) -> Split:
    for split in get_args(Split):
        if name == split:
            return split
    raise unknown_name("a drawn world", name, "a split", _SPLITS)


def _generator(split: str, seed: int, index: int, kind: str) -> np.random.Generator:
    return np.random.default_rng([seed, _SPLITS.index(_split(split)), _KINDS.index(kind), index])


def _spread(world: World, num: int, counting_share: float | None) -> list[str]:
    """`num` tags, counting in its share and the others evenly, interleaved."""
    others = [tag for tag in world.tags if tag != "counting"]
    counting = round(num * (1 / len(world.tags) if counting_share is None else counting_share))
    rest = num - counting
    sizes = {tag: rest // len(others) + (i < rest % len(others)) for i, tag in enumerate(others)} | {
        "counting": counting
    }
    # Each tag's k-th prompt is placed at the fraction (k + 1/2) / size of the list.
    places = [((k + 0.5) / size, tag) for tag, size in sizes.items() for k in range(size)]
    return [tag for _, tag in sorted(places)]


def _png(image: Image.Image) -> dict[str, bytes | None]:
    file = BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}

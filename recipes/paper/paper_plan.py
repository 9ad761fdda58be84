"""What the paper's tables need: models, arms, and for each the `agsm-rl` commands that train and measure it.

Every command is one that a user could type. `Place` says where data lies and results go; `toy=True` gives the same
commands for the shipped bases of the drawn world at a few steps and images, which shows that they run and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PUBLISHED: dict[str, Any] = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
TABLES: dict[str, Any] = PUBLISHED["tables"]
SUITES = {
    "coco": ("coco", "fid"),
    "geneval": ("geneval",),
    "long_prompts": ("long_prompts",),
    "partners": ("coco", "fid"),
    "ablations": ("coco", "fid"),
}
"""What is measured for each table."""
REWARDS: dict[str, Any] = {"image_reward": {}, "clip_score": {}, "hpsv2": {"version": "2.1"}, "pick_score": {}}
TOY_REWARDS = {
    "brightness": "image_reward",
    "sharpness": "clip_score",
    "jpeg_compressibility": "hpsv2",
    "jpeg_incompressibility": "pick_score",
}
"""Rewards without weights, and whose column each fills in a toy run."""
NUM_CAPTIONS, NUM_GENEVAL, BATCH_SIZE = 5000, 2212, 4
TOY_IMAGES, TOY_STEPS = 6, 2
TRAINING, CAPTIONS, PICTURES, LONG = "coco_train2017", "coco_val_captions.txt", "coco_val", "long_prompts.csv"
"""The data, by their names below the data's folder."""


@dataclass(frozen=True)
class Model:
    """A base and how the paper draws with it; `backbone` are options of eval's --backbone, as its recipes have them."""

    checkpoint: str
    toy: str
    guidance: float
    num_steps: int
    resolution: int
    dtype: str = "float32"
    backbone: tuple[str, ...] = ()


MODELS = {
    "sd15": Model(
        checkpoint="stable-diffusion-v1-5/stable-diffusion-v1-5",
        toy="builtin:shapes-sd15",
        guidance=7.0,
        num_steps=30,
        resolution=512,
        backbone=("scheduler=ddim", "allow_tf32=true"),
    ),
    "sdxl": Model(
        checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
        toy="builtin:shapes-sdxl",
        guidance=7.0,
        num_steps=30,
        resolution=1024,
        dtype="bfloat16",
        backbone=("scheduler=ddim",),
    ),
    "sd3": Model(
        checkpoint="stabilityai/stable-diffusion-3-medium-diffusers",
        toy="builtin:shapes-sd3",
        guidance=4.0,
        num_steps=28,
        resolution=1024,
        dtype="bfloat16",
        backbone=("t5_length=512",),
    ),
}


@dataclass(frozen=True)
class Arm:
    """A row of a table: a base (with `unet`, a partner's), released tokens, or a run of a recipe.

    Attributes:
        row: The row of the published tables that it stands for.
        recipe: The recipe that trains it; `sets` are its --set.
        best: What is measured is adapter-best/, not the parameters at the end.
        of: Not trained itself: the run of this arm is measured, with `drawn` as more options.
        released: Folder of published token files, below the data's folder.
    """

    model: str
    name: str
    row: str = ""
    recipe: str | None = None
    sets: tuple[str, ...] = ()
    best: bool = False
    of: str | None = None
    drawn: tuple[str, ...] = ()
    released: str | None = None
    unet: str | None = None

    @property
    def key(self) -> str:
        """`model/name`."""
        return f"{self.model}/{self.name}"

    @property
    def published(self) -> str:
        """The row that it stands for."""
        return f"{self.model}/{self.row or self.name}"

    @property
    def tables(self) -> list[str]:
        """The tables with such a row."""
        return [name for name, table in TABLES.items() if self.published in table["rows"]]

    @property
    def is_trained(self) -> bool:
        """Whether its figures depend on a training seed."""
        return self.recipe is not None or self.of is not None


PARTNERS = {
    "sd15": {
        "dpo": "mhdang/dpo-sd1.5-text2image-v1",
        "spo": "SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep",
        "inpo": "JaydenLu666/InPO-SD1.5",
    },
    "sdxl": {
        "dpo": "mhdang/dpo-sdxl-text2image-v1",
        "spo": "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep",
        "inpo": "JaydenLu666/InPO-SDXL",
    },
}
"""The published weights of the preference methods, by their authors' names on the hub."""
TOKENS = {"sd15": "sd1.5", "sdxl": "sdxl", "sd3": "sd3"}
"""What the authors' repositories call the folders of their tokens."""


def _arms() -> Iterator[Arm]:
    """Those that need no training first."""
    for model, folder in TOKENS.items():
        yield Arm(model, "base")
        for method in ("softrepa", "agsm"):
            yield Arm(model, f"{method}_released", row=method, released=f"tokens/{method}/{folder}")
        for partner, unet in PARTNERS.get(model, {}).items():
            yield Arm(model, partner, unet=unet)
    for model in MODELS:
        yield Arm(model, "softrepa", recipe=f"{model}_softrepa", best=True)
        yield Arm(model, "agsm", recipe=f"{model}_agsm")
        for partner, unet in PARTNERS.get(model, {}).items():
            changed = () if partner == "dpo" else (f"backbone.unet={unet}",)
            yield Arm(model, f"{partner}_agsm", recipe=f"{model}_dpo_then_agsm", sets=changed, unet=unet)
    yield Arm("sd15", "bradley_terry", recipe="sd15_agsm", sets=("objectives.0.preference=bradley_terry",))
    yield Arm("sd3", "negative_guidance", of="agsm", drawn=("--guidance-bank", "negative"))
    yield Arm("sd3", "positive_only", recipe="sd3_agsm", sets=("objectives.0.gamma_negative=0",))
    yield Arm("sd3", "one_bank", recipe="sd3_agsm", sets=("adapters.tokens.banks=1",))


ARMS = {arm.key: arm for arm in _arms()}


@dataclass(frozen=True)
class Place:
    """Where data lies and results go, and whether all is at toy size (then `bases` may replace the shipped bases)."""

    out: Path
    data: Path
    toy: bool = False
    bases: dict[str, str] = field(default_factory=dict)

    def base(self, model: str) -> str:
        """The checkpoint."""
        return self.bases.get(model, MODELS[model].toy) if self.toy else MODELS[model].checkpoint

    def folder(self, arm: Arm, seed: int) -> Path:
        """Where an arm's images and scores go."""
        return self.out / arm.model / arm.name / f"seed{seed}"

    def run(self, arm: Arm, seed: int) -> Path:
        """The run folder of an arm, or of the one whose run it measures."""
        return self.folder(ARMS[f"{arm.model}/{arm.of}"] if arm.of else arm, seed) / "run"

    def tokens(self, arm: Arm) -> Path:
        """The converted file of released tokens."""
        return self.out / arm.model / arm.name / "tokens.safetensors"

    def weights(self, arm: Arm, seed: int) -> Path | None:
        """What an arm adds to its base; None for a base."""
        if arm.released:
            return self.tokens(arm)
        best = arm.best and not self.toy
        return self.run(arm, seed) / ("adapter-best" if best else "adapter") if arm.is_trained else None

    @property
    def rewards(self) -> Path:
        """The file that names the rewards."""
        return self.out / "rewards.yaml"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        makes: What it writes.
        suite: What it measures; `images` is how many it draws for that.
        data: Files and folders that it reads, by their names below the data's folder.
        weights: The trained or released weights that it makes or measures: a file, or the folder of an adapter.
    """

    name: str
    arm: str
    seed: int
    command: tuple[str, ...]
    makes: Path
    suite: str | None = None
    images: int = 0
    data: tuple[str, ...] = ()
    weights: Path | None = None


def parts_of(arm: Arm, seed: int, place: Place, tables: Sequence[str]) -> list[Part]:
    """The commands of an arm for these tables, in order."""
    name = f"{arm.key}/seed{seed}"
    made = []
    if arm.released:
        tokens = place.tokens(arm)
        command: tuple[str, ...] = ("agsm-rl", "convert", str(place.data / arm.released), str(tokens))
        part = Part(f"{name}/convert", arm.key, seed, command, tokens, data=(arm.released,), weights=tokens)
        made.append(part)
    if arm.recipe:
        command = ("agsm-rl", "train", *_training(arm, seed, place))
        data, weights = () if place.toy else (TRAINING, CAPTIONS), place.weights(arm, seed)
        part = Part(f"{name}/train", arm.key, seed, command, place.run(arm, seed), data=data, weights=weights)
        made.append(part)
    suites = dict.fromkeys(suite for table in arm.tables if table in tables for suite in SUITES[table])
    return made + [part for suite in suites for part in _measuring(arm, seed, place, suite)]


def _training(arm: Arm, seed: int, place: Place) -> list[str]:
    sets = [f"seed={seed}", f"adapters.tokens.seed={seed}", *arm.sets]
    sets += [f"objectives.0.source.dataset={place.data / TRAINING}"]
    sets += [f"evaluate.suites.coco.prompts={place.data / CAPTIONS}"]
    if place.toy:
        sets = [text for text in sets if not text.startswith(("objectives.0.source", "evaluate", "backbone"))]
        sets += [f"backbone.checkpoint={place.base(arm.model)}", f"steps={TOY_STEPS}"]
        # What belongs to the published models: their size, their type, the text they read, other U-Nets.
        of_published = ("resolution", *(("t5_length",) if arm.model == "sd3" else ()), *(("unet",) if arm.unet else ()))
        sets += [f"backbone.{key}=null" for key in of_published]
        sets += ["backbone.dtype=float32", "objectives.0.source.dataset=builtin:shapes"]
        sets += ["objectives.0.source.num_images=8", "evaluate=null", "sample.prompts=null", "track=[]"]
        sets += ["checkpoint.best=null"]
    given = [word for text in sets for word in ("--set", text)]
    return [str(HERE / f"{arm.recipe}.yaml"), "--run-dir", str(place.run(arm, seed)), *given]


def _target(arm: Arm, seed: int, place: Place) -> list[str]:
    """What `agsm-rl eval` measures, and on which base."""
    model = MODELS[arm.model]
    options = [] if place.toy else [*model.backbone]
    if arm.released:
        target = [str(place.tokens(arm)), "--base", place.base(arm.model)]
    elif arm.is_trained:
        best = arm.best and not place.toy
        target = [str(place.run(arm, seed) / "adapter-best" if best else place.run(arm, seed))]
    else:
        target = [place.base(arm.model)]
        options += [f"unet={arm.unet}"] if arm.unet and not place.toy else []
    return target + [word for option in options for word in ("--backbone", option)]


def _measuring(arm: Arm, seed: int, place: Place, suite: str) -> Iterator[Part]:
    folder, name = place.folder(arm, seed), f"{arm.key}/seed{seed}"
    scores, weights = folder / f"{suite}.json", place.weights(arm, seed)
    if suite == "fid":
        if not place.toy:  # needs Inception's weights
            command = ["agsm-rl", "eval", str(folder / "coco"), "--suite", "fid"]
            command += ["--reference", str(place.data / PICTURES), "--json", str(scores)]
            yield Part(f"{name}/fid", arm.key, seed, tuple(command), scores, suite, data=(PICTURES,), weights=weights)
        return
    model = MODELS[arm.model]
    images = {"coco": NUM_CAPTIONS, "geneval": NUM_GENEVAL, "long_prompts": 0}[suite]
    data: tuple[str, ...] = {"coco": (CAPTIONS,), "long_prompts": (LONG,)}.get(suite, ())
    measured = ["--suite", "geneval"]
    if data:
        measured = ["--suite", "rewards", "--rewards", str(place.rewards), "--prompts", str(place.data / data[0])]
        measured += ["--prompt-column", "prompt_en"] if suite == "long_prompts" else []
    drawn = ["--guidance", f"{model.guidance:g}", "--num-steps", str(model.num_steps)]
    drawn += ["--resolution", str(model.resolution), "--dtype", model.dtype, "--batch-size", str(BATCH_SIZE)]
    if place.toy:
        images, data = TOY_IMAGES, ()
        measured = ["--suite", "shapes", "--any-base"] if suite == "geneval" else measured[:4]
        measured += [] if suite == "geneval" else ["--prompts", "builtin:shapes-prompts"]
        drawn = ["--guidance", "2", "--num-steps", str(TOY_STEPS)]
    drawn += ["--num-images", str(images)] if images else []
    kept = ["--images", str(folder / suite), "--json", str(scores)]
    command = ["agsm-rl", "eval", *_target(arm, seed, place), *measured, *drawn, *arm.drawn, *kept]
    yield Part(f"{name}/{suite}", arm.key, seed, tuple(command), scores, suite, images or 600, data, weights)


def all_parts(place: Place, *, tables: Sequence[str], arms: Sequence[str], seeds: int) -> list[Part]:
    """The commands of these arms for these tables; an arm that is not trained has one seed."""
    made = []
    for arm in (ARMS[key] for key in arms):
        if set(arm.tables) & set(tables):
            for seed in range(seeds if arm.is_trained else 1):
                made += parts_of(arm, seed, place, tables)
    return made


def write_rewards(place: Place) -> None:
    """The file that names the rewards to measure."""
    named = dict.fromkeys(TOY_REWARDS, {}) if place.toy else REWARDS
    text = yaml.safe_dump(named, sort_keys=False)
    place.rewards.parent.mkdir(parents=True, exist_ok=True)
    place.rewards.write_text(text, encoding="utf-8")

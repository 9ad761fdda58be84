"""The commented recipe that `agsm-rl init` writes, for a user's own checkpoint, data and rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from textwrap import shorten
from typing import Any

import yaml

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.files import parse_json, read_text
from agsm_rl.registry import available, permission_flags
from agsm_rl.source_code import summary_of

FROM_IMAGES = ("agsm", "softrepa", "score_matching")
"""Objectives that learn from images with captions."""
FROM_REWARDS = ("ddpo", "diffusion_nft", "flow_grpo")
"""Objectives that learn from the model's own images and their rewards."""
VIEWS = {"agsm": "best_images", "score_matching": "best_images", "diffusion_dpo": "best_against_worst"}
"""What others of them see of the model's own images."""
REWARD_OPTIONS: dict[str, dict[str, Any]] = {"hpsv2": {"version": "2.1"}, "hpsv2_official": {"version": "2.1"}}
"""Options that a reward cannot do without, as most papers set them."""
PER_DRAW = 8
"""Prompts of a draw, where the list has as many."""
OF_UNETS = (5.0, 30)
"""Guidance, as DDPO's authors draw (arXiv 2305.13301), and steps of grids and evaluation; a flow model has its own."""
DRAWN_IN = {True: 10, False: 20}
"""Most steps of a draw that is learned from, of a flow model (as Flow-GRPO, arXiv 2505.05470) and of a U-Net."""
OPTIONS = {
    "flow_grpo": "kl: published     # the KL as in Flow-GRPO's code, which its kl_weight is meant for",
    "diffusion_nft": "old: {decay: {0: 0.0, 500: 0.5}, every: draw}     # the old policy follows, as released",
}
"""What an objective should not leave at its default; Flow-GRPO's is for flow models, whose noise it is defined for."""
OF_SD3 = "gamma_negative: 0.1     # as published for SD3"
PASSES = {
    "agsm": "groups_per_pass: 1",
    "softrepa": "groups_per_pass: 1",
    "ddpo": "images_per_pass: 4",
    "flow_grpo": "images_per_pass: 4",
}
PASSES |= dict.fromkeys(("score_matching", "diffusion_nft", "diffusion_dpo"), "rows_per_pass: 4")
"""What keeps a step of a large model small; the gradient is the same."""


@dataclass(frozen=True)
class Wishes:
    """What a recipe is for.

    Attributes:
        checkpoint: The base.
        prompts: A list of prompts, from which the model draws its own images; None where it learns from `images`.
        images: A folder or data set of images with captions.
        rewards: Names of rewards for its own images.
        objectives: Names of objectives; none are those that suit the data and the base.
        held_out: Names of rewards that are measured, and not trained on.
        num_prompts: Prompts per draw.
    """

    checkpoint: str
    prompts: str | None = None
    images: str | None = None
    rewards: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    num_prompts: int = PER_DRAW

    @property
    def modules(self) -> set[str]:
        """The modules of the user's own rewards."""
        return {name.partition(":")[0] for name in (*self.rewards, *self.held_out) if ":" in name}


def check_wishes(wishes: Wishes) -> None:
    """UserError for what does not go together."""
    if wishes.prompts is None and wishes.images is None:
        raise UserError("init: give --prompts FILE (to learn from rewards) or --images FOLDER (to learn from images).")
    if wishes.rewards and wishes.prompts is None:
        raise UserError("init: --reward scores the model's own images, which it draws from --prompts FILE; add it.")
    if wishes.prompts is not None and not wishes.rewards:
        raise UserError("init: --prompts needs a --reward, which says how good an image is (`agsm-rl list rewards`).")
    known = sorted({*FROM_IMAGES, *FROM_REWARDS, *VIEWS})
    for name in wishes.objectives:
        if name not in known:
            raise unknown_name("--objective", name, "an objective that `init` writes a recipe for", known)
        if wishes.images is None and name not in (*FROM_REWARDS, *VIEWS):
            raise UserError(f"--objective {name}: learns from images with captions; add --images FOLDER.")
        if wishes.prompts is None and name not in FROM_IMAGES:
            raise UserError(f"--objective {name}: learns from the model's own images; add --prompts FILE and --reward.")
    for option, names in {"--reward": wishes.rewards, "--held-out": wishes.held_out}.items():
        for name in names:
            if ":" not in name and name not in available("rewards"):
                raise unknown_name(option, name, "a reward", available("rewards"))


def default_objectives(wishes: Wishes) -> tuple[str, ...]:
    """One for each kind of data: Flow-GRPO where the base is a flow model, otherwise DDPO; AGSM for images."""
    from_rewards = ("flow_grpo" if is_flow(wishes.checkpoint) else "ddpo",) if wishes.prompts is not None else ()
    return from_rewards + (("agsm",) if wishes.images is not None else ())


def kind_of(checkpoint: str) -> Any:
    """Its kind of backbone, by its model_index.json or by its name, None if unknown; no hub is asked."""
    from agsm_rl.backbones import kinds  # diffusers takes seconds to load

    index = Path(checkpoint) / "model_index.json"
    if index.is_file():
        content = parse_json(read_text(index), where=str(index))
        return kinds.kind_of(str(content.get("_class_name"))) if isinstance(content, dict) else None
    return kinds.kind_by_name(checkpoint)


def is_flow(checkpoint: str) -> bool:
    """Whether it is a flow model."""
    from agsm_rl.backbones import FlowPipeline

    kind = kind_of(checkpoint)
    return kind is not None and issubclass(kind, FlowPipeline)


def drawing_of(checkpoint: str) -> tuple[float, int]:
    """Guidance and steps of its pictures, as published."""
    if not is_flow(checkpoint):
        return OF_UNETS
    drawing: Any = kind_of(checkpoint).drawing_by_name(Path(checkpoint).name)
    return drawing if isinstance(drawing, tuple) else OF_UNETS  # of another package, known only once it is loaded


def starter_recipe(wishes: Wishes, file: Path) -> str:
    """The recipe's text; `file` is where it will be, for the commands in its comments."""
    check_wishes(wishes)
    objectives = wishes.objectives or default_objectives(wishes)
    small = wishes.checkpoint.startswith("builtin:")
    named = f"{quote(str(file))}{permission_flags(wishes.modules)}"
    parts = [
        f"# Written by `agsm-rl init`. Change what you like; `agsm-rl list recipe` explains every key.\n"
        f"#   agsm-rl check {named}     is it right, and how much memory does it need?\n"
        f"#   agsm-rl check {named} --fit-vram 24     what fits a GPU of 24 GB?\n"
        f"#   agsm-rl train {named} --set steps=2     a first look: two steps\n"
        f"#   agsm-rl train {named}",
        "seed: 0          # the same seed gives the same run\nsteps: 500       # steps of the optimizer",
        _backbone(wishes.checkpoint, small=small),
        _adapters(objectives),
    ]
    if wishes.prompts is not None:
        parts.append(_own_images(wishes, objectives, small=small))
    parts.append(_objectives(objectives, wishes, small=small))
    rate = "3.0e-4" if set(objectives) <= set(FROM_REWARDS) else "1.0e-4"  # as published, for a LoRA of SD1.5 and SD3
    parts.append(f"optimizer:\n  learning_rate: {rate}")
    parts.append(_evaluation(wishes, small=small))
    parts.append(
        "# Checkpoints, from which a stopped run goes on: agsm-rl train RUN --resume\ncheckpoint: {every: 100, keep: 2}"
    )
    parts.append("track: [tensorboard]     # or [wandb], or [] for metrics.jsonl alone")
    return "\n\n".join(parts) + "\n"


def _backbone(checkpoint: str, *, small: bool) -> str:
    lines = ["# The base; its kind is found by itself.", "backbone:", "  use: auto"]
    lines.append(f"  checkpoint: {_plain(checkpoint)}")
    if not small:
        lines.append("  dtype: bfloat16                # half the memory of float32; on a CPU, take float32")
        lines.append(
            "  gradient_checkpointing: true   # the same gradient in far less memory, for one more forward pass"
        )
    return "\n".join(lines)


def _adapters(objectives: Sequence[str]) -> str:
    lines = ["# What is trained; the base itself stays frozen.", "adapters:"]
    if "agsm" not in objectives:
        return "\n".join([*lines, "  lora: {use: lora, rank: 16}"])
    lines.append("  lora: {use: lora, rank: 16, banks: 2}     # AGSM keeps the second for captions that do not match")
    return "\n".join([*lines, "ema: {decay: 0.99}     # AGSM compares with this moving average; 0.9999 for long runs"])


def _own_images(wishes: Wishes, objectives: Sequence[str], *, small: bool) -> str:
    lines = ["# The model draws images from these prompts, and the rewards say how good they are.", "sources:"]
    lines += ["  own_images:", "    use: rollouts", f"    prompts: {_plain(wishes.prompts)}", "    rewards:"]
    for name in wishes.rewards:
        lines.append(f"      {_reward(name)}")
    lines += [
        f"    num_prompts: {wishes.num_prompts}         # prompts per draw",
        "    images_per_prompt: 8",
    ]
    if set(objectives) & {"flow_grpo", "diffusion_nft"}:
        lines.append("    advantages: {by: group, std: global}     # the images of a prompt are compared, as published")
    guidance, steps = drawing_of(wishes.checkpoint)
    steps = min(steps, DRAWN_IN[is_flow(wishes.checkpoint)])
    if set(objectives) & set(FROM_REWARDS) == {"diffusion_nft"}:  # which needs no noise on the way, nor guidance
        lines += ["    drawn_by: old", "    eta: 0.0", "    guidance: 1.0"]
    else:
        check = "     # as published for a model of this name" if is_flow(wishes.checkpoint) and not small else ""
        lines.append(f"    guidance: {3.0 if small else guidance}{check}")
    lines.append(f"    num_steps: {steps}          # fewer are faster, and worse")
    if not small:
        lines.append("    sample_batch_size: 4   # drawn at once: as many as learn at once, so that both round alike")
    return "\n".join(lines)


def _objectives(names: Sequence[str], wishes: Wishes, *, small: bool) -> str:
    lines = ["# What is learned: one term or several, each with its own `weight` and `every`.", "objectives:"]
    for name in names:
        lines.append(f"  # {name}: {shorten(summary_of(available('objectives')[name].target), 100)}")
        if name in FROM_IMAGES and wishes.images is not None:
            source = f"{{use: pairs, dataset: {_plain(wishes.images)}, batch_size: 16}}"
            lines += [f"  - use: {name}", f"    source: {source}"]
        else:
            lines += [f"  - use: {name}", "    source: own_images"]
            if name in VIEWS:
                lines.append(f"    view: {{use: {VIEWS[name]}}}")
        if name in OPTIONS and (name != "flow_grpo" or is_flow(wishes.checkpoint)):
            lines.append(f"    {OPTIONS[name]}")
        if name == "agsm" and getattr(kind_of(wishes.checkpoint), "name", "") == "stable_diffusion_3":
            lines.append(f"    {OF_SD3}")
        if not small:
            lines.append(f"    {PASSES[name]}     # smaller passes, the same gradient")
    return "\n".join(lines)


def _evaluation(wishes: Wishes, *, small: bool) -> str:
    """Grids of pictures, and what is measured: base against trained, on the same prompts and noise."""
    lines = ["# A grid of pictures every so many steps, the base's first, always from the same noise."]
    lines += ["sample:", "  every: 50", "  num_images: 8"]
    guidance, steps = drawing_of(wishes.checkpoint)
    own = [] if small else [f"  guidance: {guidance}", f"  num_steps: {steps}"]
    lines += own
    if wishes.prompts is not None:
        lines.append(f"  prompts: {_plain(wishes.prompts)}")
    measured = dict.fromkeys([*wishes.rewards, *wishes.held_out])
    drawn = wishes.images in ("builtin:shapes", "builtin:scenes")
    of_images = f"{wishes.images}-prompts" if drawn else wishes.images
    prompts = wishes.prompts or of_images  # a folder's captions are prompts
    lines += ["", "# Base against trained, on the same prompts and noise. A score is named as in `mine/NAME`, for"]
    lines += [
        "# `checkpoint: {best: mine/NAME}`. What is measured and not trained on shows whether a reward is hacked."
    ]
    if small:
        world = "scenes" if wishes.checkpoint.startswith("builtin:scenes-") else "shapes"
        rewards = ", ".join(f"{_plain(name)}: {_measured(name)}" for name in measured if name != world)
        block = f"rewards: {{{rewards}}}"
        if world == "shapes":
            lines.append(f"evaluate: {{suite: shapes, every: 250, {block}}}")
        else:
            lines.append(f"evaluate: {{every: 250, suites: {{scenes: {{use: scenes, {block}}}}}}}")
    elif measured:
        lines += ["evaluate:", "  every: 250", *own, "  suites:", "    mine:", "      use: rewards"]
        lines += [f"      prompts: {_plain(prompts)}     # better: others than those it trains on"]
        lines += ["      num_images: 64", "      rewards:"]
        lines += [f"        {_plain(name)}: {_measured(name)}" for name in measured]
    else:
        lines += ["# evaluate:", "#   every: 250", "#   suites:"]
        lines.append("#     mine: {use: rewards, prompts: prompts.txt, num_images: 64, rewards: {clip_score: {}}}")
    return "\n".join(lines)


def _measured(name: str) -> str:
    return _plain_options(REWARD_OPTIONS.get(name, {}))


def _reward(name: str) -> str:
    """A reward of weight 1, with what it cannot do without."""
    options = REWARD_OPTIONS.get(name)
    key = _plain(name)
    if options is None:
        return f"{key}: 1.0"
    return f"{key}: {_plain_options({'weight': 1.0} | options)}"


def _plain_options(options: Mapping[str, Any]) -> str:
    return f"{{{', '.join(f'{option}: {json.dumps(value)}' for option, value in options.items())}}}"


def _plain(text: str | None) -> str:
    """A text as YAML."""
    return yaml.safe_dump(text, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()

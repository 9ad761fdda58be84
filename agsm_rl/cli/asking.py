"""What `agsm-rl init` asks for, the defaults of what is neither given nor asked for, and checks of both.

Apart from the command, which `agsm-rl --help` imports: this module needs all of the recipe's schema.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer
import yaml

from agsm_rl.errors import UserError
from agsm_rl.files import local_or_hub
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.starter import PER_DRAW, Wishes, check_wishes, default_objectives
from agsm_rl.registry import available
from agsm_rl.run.screen import say

BASE = "builtin:shapes-sd15"
WORLD = "builtin:shapes-prompts"
REWARD_OF = {WORLD: "shapes", "builtin:scenes-prompts": "scenes"}
"""The prompts of the drawn worlds, and their own rewards."""
ALLOWED_BASES = (
    "a pipeline folder, a .safetensors file, a name on the hub (owner/name), or a builtin such as builtin:shapes-sd15"
)
ALLOWED_PROMPTS = (
    "a .txt, .jsonl, .csv or .parquet file, a name on the hub (owner/name), "
    "builtin:shapes-prompts or builtin:scenes-prompts"
)
ALLOWED_IMAGES = "a folder of images with captions, a name on the hub (owner/name), builtin:shapes or builtin:scenes"


def num_prompts(prompts: str | None) -> int:
    """Prompts per draw: no more than the list has; a data set on the hub is not asked. UserError for an empty list."""
    if prompts is None or not (prompts in REWARD_OF or Path(prompts).exists()):
        return PER_DRAW
    from agsm_rl.sources.prompt_lists import read_prompts

    return len(read_prompts(prompts, limit=PER_DRAW, where="--prompts"))


def check_recipe(text: str, out: Path, wishes: Wishes) -> None:
    """UserError unless the recipe can be trained. The user's own command line names the modules of its rewards."""
    Recipe.from_data(yaml.safe_load(text), where=str(out), allow_imports=wishes.modules)


def check_places(wishes: Wishes) -> None:
    """UserError for a checkpoint, prompts or images that are not there; no hub is asked."""
    places = [("--checkpoint", wishes.checkpoint, ALLOWED_BASES)]
    places += [("--prompts", wishes.prompts or "", ALLOWED_PROMPTS), ("--images", wishes.images or "", ALLOWED_IMAGES)]
    for option, name, allowed in places:
        if name and not name.startswith("builtin:"):
            local_or_hub(name, where=option, allowed=allowed)


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def with_defaults(wishes: Wishes) -> Wishes:
    """What was neither given nor asked for: the shapes world, whose base, prompts and reward go together."""
    checkpoint, prompts, rewards = wishes.checkpoint or BASE, wishes.prompts, wishes.rewards
    if prompts is None and wishes.images is None:
        prompts = _prompts_of(checkpoint)
    if prompts is not None and not rewards:
        rewards = (_default_reward(prompts),)
    return replace(wishes, checkpoint=checkpoint, prompts=prompts, rewards=rewards)


def complete(wishes: Wishes) -> Wishes:
    """Ask for what is missing, again where an answer cannot be used."""
    if not wishes.checkpoint:
        base = _answer(f"Base ({ALLOWED_BASES})", BASE, lambda text: check_places(Wishes(text)))
        wishes = replace(wishes, checkpoint=base)
    if wishes.prompts is None and wishes.images is None:
        say("Learn from rewards of the model's own images, or from images that you have?")
        if _answer("rewards or images", "rewards", _rewards_or_images) == "images":
            wishes = replace(wishes, images=_answer(f"Images ({ALLOWED_IMAGES})", "builtin:shapes", _check_images))
        else:
            wishes = replace(
                wishes, prompts=_answer(f"Prompts ({ALLOWED_PROMPTS})", _prompts_of(wishes.checkpoint), _check_prompts)
            )
    if wishes.prompts is not None and not wishes.rewards:
        say(f"Rewards: {', '.join(available('rewards'))}; or module:function of your own.")
        rewards = _answer(
            "Rewards, with commas", _default_reward(wishes.prompts), lambda text: check_wishes(_judged(text))
        )
        wishes = replace(wishes, rewards=_names(rewards))
    if not wishes.objectives:
        known = wishes

        def check(text: str) -> None:
            check_wishes(replace(known, objectives=_names(text)))

        objectives = _answer("Objectives, with commas", ",".join(default_objectives(known)), check)
        wishes = replace(wishes, objectives=_names(objectives))
    return wishes


def _default_reward(prompts: str) -> str:
    return REWARD_OF.get(prompts, "aesthetic")


def _prompts_of(checkpoint: str) -> str:
    """The prompts of the world that a base was trained on; of the shapes world for any other base."""
    return "builtin:scenes-prompts" if checkpoint.startswith("builtin:scenes-") else WORLD


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _judged(rewards: str) -> Wishes:
    return Wishes(BASE, prompts=WORLD, rewards=_names(rewards))


def _rewards_or_images(text: str) -> None:
    if text not in ("rewards", "images"):
        raise UserError(f"got '{text}'; answer rewards or images.")


def _check_prompts(text: str) -> None:
    check_places(Wishes("", prompts=text))


def _check_images(text: str) -> None:
    check_places(Wishes("", images=text))


def _answer(question: str, default: str, check: Callable[[str], None]) -> str:
    """An answer that `check` accepts."""
    while True:
        answer = str(typer.prompt(question, default=default)).strip()
        try:
            check(answer)
        except UserError as error:
            say(f"  {error}")
        else:
            return answer

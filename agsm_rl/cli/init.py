"""`agsm-rl init`: a commented recipe for the user's own checkpoint, data and rewards, after a few questions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from agsm_rl.errors import UserError
from agsm_rl.files import local_or_hub, write_text
from agsm_rl.recipe.starter import Wishes, check_wishes, default_objectives, starter_recipe
from agsm_rl.registry import available
from agsm_rl.run.screen import say

BASE = "builtin:shapes-sd15"
WORLD = "builtin:shapes-prompts"
ALLOWED_BASES = "a pipeline folder, a .safetensors file, a name on the hub (owner/name), or builtin:shapes-sd15"
ALLOWED_PROMPTS = "a .txt, .jsonl, .csv or .parquet file, a name on the hub (owner/name), or builtin:shapes-prompts"
ALLOWED_IMAGES = "a folder of images with captions, a name on the hub (owner/name), or builtin:shapes"


def init(
    out: Annotated[Path, typer.Option("-o", metavar="FILE", help="The recipe to write; it must not exist.")] = Path(
        "recipe.yaml"
    ),
    checkpoint: Annotated[str | None, typer.Option(help=f"The base: {ALLOWED_BASES}.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Learn from rewards of the model's own images of these prompts.")
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="FOLDER", help="Learn from these images with captions.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A reward to learn from, or module:function of your own. Repeatable."),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="NAME", help="A reward that is only measured. Repeatable."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Default: ddpo (SD3: flow_grpo) for prompts, agsm for images. Repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; what is not given gets a default.")] = False,
) -> None:
    """Write a commented recipe for your checkpoint, data and rewards; asks for what the options leave out."""
    if out.exists():
        raise UserError(f"-o {out}: this file exists, and is not overwritten; give another name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"-o {out}: there is no folder {out.absolute().parent}.")
    wishes = Wishes(
        checkpoint=checkpoint or "",
        prompts=prompts,
        images=images,
        rewards=tuple(reward or ()),
        objectives=tuple(objective or ()),
        held_out=tuple(held_out or ()),
    )
    is_complete = checkpoint is not None and (images is not None or (prompts is not None and bool(reward)))
    if not yes and not is_complete:
        if not is_terminal():
            raise UserError(
                "init: there is no terminal to ask on; give --checkpoint, and --prompts with --reward or --images, or "
                "add --yes for the defaults."
            )
        wishes = _ask(wishes)
    wishes = _with_defaults(wishes)
    check_places(wishes)
    wishes = replace(wishes, examples=_examples(wishes.prompts))
    text = starter_recipe(wishes, out)
    allow = check_recipe(text, out, wishes)
    write_text(out, text)
    say(f"{out}: written. Next: agsm-rl check {out}{allow}")


def _examples(prompts: str | None) -> tuple[str, ...]:
    """The first prompts of a file; UserError where it holds none. A data set on the hub is not asked for."""
    if prompts is None or not (prompts == WORLD or Path(prompts).exists()):
        return ()
    from agsm_rl.sources.prompt_lists import read_prompts

    return tuple(prompt.text for prompt in read_prompts(prompts, limit=8, where="--prompts"))


def check_recipe(text: str, out: Path, wishes: Wishes) -> str:
    """UserError unless the recipe can be trained; the options that it needs on the command line."""
    import yaml

    from agsm_rl.recipe.recipe import Recipe
    from agsm_rl.registry import permission_flags

    # The user's own command line names these modules.
    modules = {name.partition(":")[0] for name in (*wishes.rewards, *wishes.held_out) if ":" in name}
    Recipe.from_data(yaml.safe_load(text), where=str(out), allow_imports=modules)
    return permission_flags(modules)


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


def _with_defaults(wishes: Wishes) -> Wishes:
    """What was neither given nor asked for: the shapes world, whose base, prompts and reward go together."""
    checkpoint, prompts, rewards = wishes.checkpoint or BASE, wishes.prompts, wishes.rewards
    if prompts is None and wishes.images is None:
        prompts = WORLD
    if prompts is not None and not rewards:
        rewards = ("shapes",) if prompts == WORLD else ("aesthetic",)
    return Wishes(checkpoint, prompts, wishes.images, rewards, wishes.objectives, wishes.held_out)


def _ask(wishes: Wishes) -> Wishes:
    """Ask for what is missing, again where an answer cannot be used."""
    checkpoint, prompts, images = wishes.checkpoint, wishes.prompts, wishes.images
    rewards, objectives = wishes.rewards, wishes.objectives
    if not checkpoint:
        checkpoint = _answer(f"Base ({ALLOWED_BASES})", BASE, lambda text: check_places(Wishes(text)))
    if prompts is None and images is None:
        say("Learn from rewards of the model's own images, or from images that you have?")
        if _answer("rewards or images", "rewards", _rewards_or_images) == "images":
            images = _answer(f"Images ({ALLOWED_IMAGES})", "builtin:shapes", _check_images)
        else:
            prompts = _answer(f"Prompts ({ALLOWED_PROMPTS})", WORLD, _check_prompts)
    if prompts is not None and not rewards:
        say(f"Rewards: {', '.join(available('rewards'))}; or module:function of your own.")
        default = "shapes" if prompts == WORLD else "aesthetic"
        answer = _answer("Rewards, with commas", default, lambda text: check_wishes(_judged(text)))
        rewards = _names(answer)
    if not objectives:
        known = Wishes(checkpoint, prompts, images, rewards)

        def check(text: str) -> None:
            check_wishes(Wishes(checkpoint, prompts, images, rewards, _names(text)))

        objectives = _names(_answer("Objectives, with commas", ",".join(default_objectives(known)), check))
    return Wishes(checkpoint, prompts, images, rewards, objectives, wishes.held_out)


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

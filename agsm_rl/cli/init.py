"""`agsm-rl init`: a commented recipe for the user's own checkpoint, data and rewards, after a few questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from agsm_rl.errors import UserError
from agsm_rl.files import write_text
from agsm_rl.registry import permission_flags
from agsm_rl.run.screen import say


def init(
    out: Annotated[Path, typer.Option("-o", metavar="FILE", help="The recipe to write; it must not exist.")] = Path(
        "recipe.yaml"
    ),
    checkpoint: Annotated[
        str | None, typer.Option(help="The base: a pipeline folder, a .safetensors file, or a name on the hub.")
    ] = None,
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
        typer.Option(metavar="NAME", help="Default: ddpo or, on flow models, flow_grpo for prompts; agsm for images."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; what is not given gets a default.")] = False,
) -> None:
    """Write a commented recipe for your checkpoint, data and rewards; asks for what the options leave out."""
    if out.exists():
        raise UserError(f"-o {out}: this file exists, and is not overwritten; give another name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"-o {out}: there is no folder {out.absolute().parent}.")
    from agsm_rl.cli import asking
    from agsm_rl.recipe.starter import Wishes, starter_recipe

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
        if not asking.is_terminal():
            raise UserError(
                "init: there is no terminal to ask on; give --checkpoint, and --prompts with --reward or --images, or "
                "add --yes for the defaults."
            )
        wishes = asking.complete(wishes)
    wishes = asking.with_defaults(wishes)
    asking.check_places(wishes)
    wishes = replace(wishes, num_prompts=asking.num_prompts(wishes.prompts))
    text = starter_recipe(wishes, out)
    asking.check_recipe(text, out, wishes)
    write_text(out, text)
    say(f"{out}: written. Next: agsm-rl check {quote(str(out))}{permission_flags(wishes.modules)}")

"""Whether the options of `agsm-rl eval` go together, answered before anything is drawn or judged.

An option that nothing is drawn or judged by is refused, and so is one that contradicts a folder of images which a model
is drawn like: figures must not seem to be of something that they are not of.
"""

from __future__ import annotations

from pathlib import Path

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings, read_pinned
from agsm_rl.evaluate.image_folder import METADATA, is_image_folder, pictures_in, read_images
from agsm_rl.evaluate.suite import Suite
from agsm_rl.evaluate.suite_process import EvalOptions, is_drawn, is_plain_folder

OF_TARGET = ("bank", "guidance_bank", "guidance_prompt")
"""Settings that a target to compare with is not drawn by."""
OF_ANY = ("guidance", "num_steps", "prompt_suffix")
"""Settings that any model is drawn by."""
OWN_FLAGS = ("dtype", "resolution")
"""Options of the backbone that have flags of their own; the others are given by --backbone."""
PROMPT_OPTIONS = ("prompts", "prompt_column", "prompt_split")
"""A suite's options that name the prompts to draw."""


def check_options(target: str, suite: Suite, options: EvalOptions) -> None:
    """UserError for options that contradict each other or the images that exist, or that have no effect."""
    if options.against and options.compare:
        raise UserError("--against and --compare: give one, not both; --compare compares with the target's own base.")
    exists = _exists(target, suite)
    draws = not exists or not (options.against is None or _exists(options.against, suite))
    if options.compare and exists:
        raise UserError(f"--compare: {target} has no base; give a target to compare with as --against.")
    _check_effect(target, _without_effect(suite, options, exists=exists, draws=draws))
    if options.images is not None and not draws:
        raise UserError(f"--images {options.images}: {target} is already drawn; leave --images out.")
    if options.share is not None and options.images is None and draws:
        raise UserError("--shard: the shares need a shared folder; give one as --images.")
    if options.images is not None and options.images.exists() and not options.images.is_dir():
        raise UserError(f"--images {options.images}: this is a file; give a folder.")
    if draws and options.against is not None:
        for images in (target, options.against):
            if is_image_folder(Path(images)):
                _check_alike(Path(images), suite, options)
            elif _exists(images, suite) and not is_drawn(images):
                _check_number(Path(images), suite)


def _exists(target: str, suite: Suite) -> bool:
    return is_drawn(target) or is_plain_folder(target, suite)


def _without_effect(suite: Suite, options: EvalOptions, *, exists: bool, draws: bool) -> list[str]:
    """The options given of how to draw that nothing is drawn by: a target to compare with has no bank and no base."""
    drawing, usual, flags = options.drawing, DrawingSettings(), []
    if exists:
        flags += [_flag(name) for name in OF_TARGET if getattr(drawing, name) != getattr(usual, name)]
        flags += ["--base"] if options.base is not None else []
    if not draws:
        flags += [_flag(name) for name in OF_ANY if getattr(drawing, name) is not None]
        flags += [_flag(name if name in OWN_FLAGS else "backbone") for name in options.backbone]
        flags += ["--num-images"] if options.num_images is not None else []
        flags += ["--seed"] if drawing.seed is not None and "seed" in suite.only_draws else []
        flags += [flag for name, flag in options.suite_flags.items() if name in suite.only_draws]
    return list(dict.fromkeys(flags))


def _check_effect(target: str, unused: list[str]) -> None:
    if len(unused) == 1:
        raise UserError(f"{unused[0]}: has no effect, {target} is already drawn; leave the option out.")
    if unused:
        raise UserError(f"{', '.join(unused)}: have no effect, {target} is already drawn; leave these options out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_alike(folder: Path, suite: Suite, options: EvalOptions) -> None:
    """UserError where a model that is drawn like the images of a folder is asked to be drawn otherwise."""
    recorded, others = read_pinned(folder) or {}, []
    for name in ("seed", "prompt_suffix"):
        given = getattr(options.drawing, name)
        if given is not None and name in recorded and given != recorded[name]:
            others.append(f"{_flag(name)} {given!r}: {folder} was drawn with {recorded[name]!r}")
    named = [options.suite_flags[name] for name in PROMPT_OPTIONS if name in options.suite_flags]
    difference = _other_prompt(folder, suite) if named else None
    if difference is not None:
        others.append(f"{', '.join(named)}: {difference}")
    if others:
        raise UserError(
            f"{'; '.join(others)}. What is compared with a folder of images is drawn for its prompts, with its seed "
            "and prompt suffix; leave the option out, or draw a folder of your own (--images) and compare the two."
        )


def _other_prompt(folder: Path, suite: Suite) -> str | None:
    """Where the prompts of a folder are not the suite's; None if they are."""
    prompts = suite.prompts()
    for item in read_images(folder):
        row = prompts.get(item.prompt_index)
        if row is None or str(row["prompt"]) != item.prompt:
            ours = "there is none of this number" if row is None else f"it should be '{row['prompt']:.200}'"
            return f"{item.path.parents[1] / METADATA} has the prompt '{item.prompt:.200}', but {ours}"
    return None


def _check_number(folder: Path, suite: Suite) -> None:
    """UserError unless a model is drawn as often as a folder has pictures, whose prompts are not known."""
    suite.prompts()  # which refuses to have none
    there, asked = len(pictures_in(folder)), suite.num_images
    if there != asked:
        raise UserError(
            f"{folder}: has {there} pictures, but {asked} would be drawn to compare with them; give --num-images "
            f"{there}, or another list of prompts."
        )

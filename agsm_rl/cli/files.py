"""The commands that write files for other tools: convert and world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.run.screen import say
from agsm_rl.training.limits import MAX_SEED


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A run, an exported adapter, published .pth tokens, or a LoRA, LoHa or LoKr of kohya's."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors file; a folder for .pth tokens and PEFT.")],
    to: Annotated[
        Literal["agsm-rl", "agsm", "softrepa", "kohya", "peft"] | None,
        typer.Option(
            help="agsm-rl: for attach(). agsm, softrepa: .pth tokens. kohya: a LoRA, LoHa or LoKr "
            "for ComfyUI and A1111. peft: a folder for PEFT. "
            "Default: agsm-rl for a file; for a folder agsm, or softrepa if there is only one bank."
        ),
    ] = None,
) -> None:
    """Convert adapters from and to the files that their authors and other tools use."""
    if not source.exists():
        raise UserError(
            f"IN '{source}': there is no such file or folder (looked from {Path.cwd()}); give a run, an exported "
            "adapter, published .pth tokens, or a LoRA of kohya's."
        )
    from agsm_rl.export.convert import convert as convert_adapter

    for file in convert_adapter(source, out, to, tell=lambda line: say(line, err=True)):
        say(str(file))


def world(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    split: Annotated[str, typer.Option(help="train, validation or held_out")] = "train",
    num_images: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of what is drawn.")] = 0,
    name: Annotated[str, typer.Option("--world", help="shapes or scenes")] = "shapes",
) -> None:
    """Write a drawn world to disk as an image folder that `datasets` reads."""
    from agsm_rl.shapes.data import write_image_folder
    from agsm_rl.shapes.worlds import WORLDS

    if name not in WORLDS:
        raise unknown_name("--world", name, "a drawn world", WORLDS)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"DIR {folder}: cannot be made ({error.strerror}); give another place.") from error
    write_image_folder(folder, split, num_images, seed, WORLDS[name])
    say(f"{folder}: {num_images} images with captions")

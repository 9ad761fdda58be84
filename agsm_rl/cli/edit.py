"""`agsm-rl edit`: its options in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agsm_rl.cli.options import (
    BankOption,
    BaseOption,
    GuidanceBankOption,
    GuidanceOption,
    GuidancePromptOption,
    ResolutionOption,
    StepsOption,
    TargetArgument,
    finite,
    grouped,
    resolution_of,
)
from agsm_rl.cli.results import check_output_folder
from agsm_rl.registry import permissions
from agsm_rl.run.screen import say, without_loading_bars
from agsm_rl.training.limits import MAX_BATCH, MAX_SEED


@dataclass(frozen=True)
class Editing:
    """How the image is edited."""

    method: Annotated[
        Literal["inversion", "flowedit"] | None,
        typer.Option(help="flowedit is for flow models, and their default; inversion works with every model."),
    ] = None
    num_steps: StepsOption = None
    strength: Annotated[
        float | None,
        typer.Option(help="Share of the steps that the edit goes through; less keeps more. Default: 1; flowedit 0.66."),
    ] = None
    guidance: GuidanceOption = None
    source_guidance: Annotated[
        float | None, typer.Option(callback=finite, help="Guidance under the source prompt. Default: 1; flowedit 3.5.")
    ] = None
    n_min: Annotated[
        int | None, typer.Option(min=0, help="flowedit: last steps that draw in the ordinary way. Default: 0.")
    ] = None
    n_avg: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_BATCH, help="flowedit: noises that each step averages over. Default: 1."),
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of flowedit's noise; inversion has none.")] = 0
    bank: BankOption = "positive"
    guidance_bank: GuidanceBankOption = None
    guidance_prompt: GuidancePromptOption = None


@dataclass(frozen=True)
class Base:
    """The model."""

    base: BaseOption = None
    resolution: ResolutionOption = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Type of the base's weights.")
    ] = None
    allow_import: Annotated[
        list[str] | None,
        typer.Option("--allow-import", metavar="MODULE", help="Let TARGET use code from this module. Repeatable."),
    ] = None

    def backbone(self) -> dict[str, Any]:
        """The options of the backbone that are given."""
        options = {"dtype": self.dtype, "resolution": resolution_of(self.resolution)}
        return {key: value for key, value in options.items() if value is not None}


@grouped
def edit(
    target: TargetArgument,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image; the square in its middle is edited.")],
    source: Annotated[str, typer.Option("--from", metavar="TEXT", help="What the image shows.")],
    to: Annotated[str, typer.Option("--to", metavar="TEXT", help="What it should show.")],
    out: Annotated[
        Path, typer.Option("-o", help="Folder for the pictures; those that are there are kept, new ones get a number.")
    ] = Path("edits"),
    compare: Annotated[bool, typer.Option("--compare", help="Also the same edit with the base alone.")] = False,
    *,
    editing: Editing,
    model: Base,
) -> None:
    """Edit an image by text: source, edited image and base's edit, side by side in a captioned grid too."""
    check_output_folder(out, option="-o")
    from agsm_rl.editing.editor import EditSettings
    from agsm_rl.evaluate.edit import EditOptions, draw_edit, open_image
    from agsm_rl.evaluate.target import open_target

    without_loading_bars()
    picture = open_image(image)
    options = EditOptions(
        source=source,
        target=to,
        seed=editing.seed,
        settings=EditSettings(
            method=editing.method,
            num_steps=editing.num_steps,
            strength=editing.strength,
            guidance=editing.guidance,
            source_guidance=editing.source_guidance,
            n_min=editing.n_min,
            n_avg=editing.n_avg,
        ),
        bank=editing.bank,
        guidance_bank=editing.guidance_bank,
        guidance_prompt=editing.guidance_prompt,
        compare=compare,
    )
    granted = permissions(imports=model.allow_import)
    opened = open_target(target, base=model.base, options=model.backbone(), allow_imports=granted)
    draw_edit(opened, picture, image.stem, out, options, tell=say)

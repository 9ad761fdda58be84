"""`agsm-rl eval`: its options in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agsm_rl.cli.loading import loading_libraries
from agsm_rl.cli.options import (
    BankOption,
    BaseOption,
    GuidanceBankOption,
    GuidanceOption,
    GuidancePromptOption,
    Permissions,
    ResolutionOption,
    StepsOption,
    grouped,
    resolution_of,
)
from agsm_rl.cli.results import check_output_file, check_output_folder
from agsm_rl.errors import UserError
from agsm_rl.evaluate.suite_options import SuiteOptions
from agsm_rl.run.screen import without_loading_bars
from agsm_rl.training.limits import MAX_SEED

SHAPES_BATCH = 50
"""Images of the drawn worlds, which are small, are drawn so many at a time unless they are kept."""


@dataclass(frozen=True)
class Drawing:
    """How images are drawn."""

    num_images: Annotated[int | None, typer.Option(min=1, help="Default: the suite's (shapes 600, geneval 2212).")] = (
        None
    )
    guidance: GuidanceOption = None
    num_steps: StepsOption = None
    prompt_suffix: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Added to every prompt, e.g. ', best quality'; the suite does not see it."),
    ] = ""
    resolution: ResolutionOption = None
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise, and of drawn worlds' prompts.")] = 0
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images drawn at a time. Default: shapes 50, or 8 where images are kept.")
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Type of the base's weights.")
    ] = None
    bank: BankOption = "positive"
    guidance_bank: GuidanceBankOption = None
    guidance_prompt: GuidancePromptOption = None
    base: BaseOption = None
    backbone_option: Annotated[
        list[str] | None,
        typer.Option(
            "--backbone",
            metavar="NAME=VALUE",
            help="Any other option of the backbone (`agsm-rl list stable_diffusion`), e.g. scheduler=ddim. Repeatable.",
        ),
    ] = None

    def backbone(self) -> dict[str, Any]:
        """The options of the backbone that are given."""
        from agsm_rl.evaluate.choose import named_values

        options = {"dtype": self.dtype, "resolution": resolution_of(self.resolution)}
        given = {key: value for key, value in options.items() if value is not None}
        named = named_values(self.backbone_option or (), flag="--backbone")
        for key in ("checkpoint", "use"):
            if key in named:
                raise UserError(f"--backbone {key}: what is drawn with is TARGET, or --base; leave this option out.")
        return named | given


@dataclass(frozen=True)
class Comparison:
    """What to compare with."""

    compare: Annotated[bool, typer.Option("--compare", help="Also the base, on the same prompts and noise.")] = False
    against: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Also this target, on the same prompts and noise.")
    ] = None


@dataclass(frozen=True)
class Output:
    """What is kept."""

    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file.")] = None
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the images here; those already there are not drawn again.")
    ] = None
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Draw and measure this share only.")] = None

    def check(self) -> None:
        """UserError, before anything is drawn, when something cannot be written there."""
        if self.json_file is not None:
            check_output_file(self.json_file, option="--json")
        if self.images is not None:
            check_output_folder(self.images, option="--images")


@dataclass(frozen=True)
class SuiteFlags(SuiteOptions):
    """Options of single suites."""

    split: Annotated[str | None, typer.Option(help="shapes, scenes: train, validation or held_out (default).")] = None
    any_base: Annotated[
        bool, typer.Option("--any-base", help="shapes, scenes: also on a base that was not trained on that world.")
    ] = False
    detector: Annotated[str | None, typer.Option(help="geneval: a Mask2Former for COCO instances.")] = None
    classifier: Annotated[str | None, typer.Option(help="geneval: a CLIP, for colours.")] = None
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:OPTION=VALUE,…]", help="rewards: by name; default: a run's own. Repeatable."),
    ] = None
    rewards_file: Annotated[
        Path | None, typer.Option("--rewards", metavar="FILE", help="rewards: a YAML file of {name: weight, …}.")
    ] = None
    prompts: Annotated[
        str | None, typer.Option(help="rewards, fid: a .txt, .jsonl, .csv or .parquet file, or a `datasets` name.")
    ] = None
    prompt_column: Annotated[str | None, typer.Option(help="rewards, fid: the column that holds the prompts.")] = None
    prompt_split: Annotated[str | None, typer.Option(help="rewards, fid: the data set's split.")] = None
    reference: Annotated[str | None, typer.Option(metavar="DIR", help="fid: a folder of real images.")] = None
    inception: Annotated[
        str | None, typer.Option(metavar="FILE", help="fid: the weights of the Inception network.")
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other option of the suite (`agsm-rl list SUITE`). Repeatable."),
    ] = None


@grouped
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run folder, an exported adapter, a LoRA, a base, a folder of images in GenEval's layout, or a "
            "results.jsonl.",
        ),
    ],
    suite: Annotated[str, typer.Option(help="shapes, geneval, rewards, fid, …: `agsm-rl list suites`.")] = "shapes",
    *,
    drawing: Drawing,
    comparison: Comparison,
    output: Output,
    options: SuiteFlags,
    allowed: Permissions,
    context: typer.Context,
) -> None:
    """Measure a model, or images that any tool made, on a suite, with 95 % intervals."""
    options.check(suite, allowed.granted())
    output.check()
    with loading_libraries():
        from agsm_rl.evaluate.choose import make_suite
        from agsm_rl.evaluate.draw_folder import DrawingSettings
        from agsm_rl.evaluate.evaluate_target import EvalOptions, evaluate_target

        without_loading_bars()

    granted = allowed.granted()
    usual_batch = (
        SHAPES_BATCH if suite in ("shapes", "scenes") and output.images is None else DrawingSettings.batch_size
    )
    settings = DrawingSettings(
        seed=drawing.seed if _is_given(context, "seed") else None,
        guidance=drawing.guidance,
        num_steps=drawing.num_steps,
        batch_size=drawing.batch_size or usual_batch,
        prompt_suffix=drawing.prompt_suffix if _is_given(context, "prompt_suffix") else None,
        bank=drawing.bank,
        guidance_bank=drawing.guidance_bank,
        guidance_prompt=drawing.guidance_prompt,
    )
    what = EvalOptions(
        images=output.images,
        num_images=drawing.num_images,
        drawing=settings,
        share=output.shard,
        against=comparison.against,
        compare=comparison.compare,
        base=drawing.base,
        backbone=drawing.backbone(),
        suite_flags=options.flags(),
        allow_imports=granted,
    )
    chosen = make_suite(
        suite, options, target=target, num_images=drawing.num_images, seed=drawing.seed, allow_imports=granted
    )
    evaluate_target(target, chosen, what, json_file=output.json_file)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, be it with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"

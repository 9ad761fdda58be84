"""`agsm-rl eval`: its options, and which kind of evaluation they ask for."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from agsm_rl.cli.options import (
    AllowOption,
    BankOption,
    BaseOption,
    CommandOption,
    GuidanceOption,
    HostOption,
    StepsOption,
)
from agsm_rl.errors import UserError
from agsm_rl.run.screen import without_loading_bars
from agsm_rl.training.limits import MAX_SEED


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run folder, an exported adapter, a LoRA, a base, a folder of images in GenEval's layout, or a "
            "results.jsonl.",
        ),
    ],
    suite: Annotated[str, typer.Option(help="shapes, geneval, rewards or fid")] = "shapes",
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Default: the suite's (shapes 600, geneval 2212).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
    split: Annotated[str | None, typer.Option(help="shapes: train, validation or held_out (default).")] = None,
    guidance: GuidanceOption = None,
    num_steps: StepsOption = None,
    prompt_suffix: Annotated[
        str, typer.Option(metavar="TEXT", help="Put behind each prompt, e.g. ', best quality'; not seen by measures.")
    ] = "",
    resolution: Annotated[int | None, typer.Option(min=8, help="Pixels a side; default: the base's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images drawn at a time. Default: shapes 50, or 8 where images are kept.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the base's weights.")
    ] = None,
    bank: BankOption = "positive",
    compare: Annotated[bool, typer.Option("--compare", help="Also the base, on the same prompts and noise.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Also this target, on the same prompts and noise.")
    ] = None,
    base: BaseOption = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the images here; those that are there are not drawn again.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Draw and measure this share only.")] = None,
    detector: Annotated[str | None, typer.Option(help="geneval: a Mask2Former for COCO instances.")] = None,
    classifier: Annotated[str | None, typer.Option(help="geneval: a CLIP, for colours.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:OPTION=VALUE,…]", help="rewards: by name; default: a run's own. Repeatable."),
    ] = None,
    rewards_file: Annotated[
        Path | None, typer.Option("--rewards", metavar="FILE", help="rewards: a YAML of {name: weight, …}.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="rewards, fid: a .txt, .jsonl, .csv or .parquet file, or a `datasets` name.")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="The prompts' column.")] = None,
    prompt_split: Annotated[str | None, typer.Option(help="The data set's split.")] = None,
    reference: Annotated[Path | None, typer.Option(metavar="DIR", help="fid: real images.")] = None,
    inception: Annotated[Path | None, typer.Option(metavar="FILE", help="fid: the network's weights.")] = None,
    allow_import: AllowOption = None,
    allow_command: CommandOption = None,
    allow_host: HostOption = None,
) -> None:
    """Measure a model, or images that any tool made, on a suite, with 95 % intervals."""
    from agsm_rl.evaluate.choose import SuiteOptions, make_suite
    from agsm_rl.registry import permissions

    given = SuiteOptions(
        split=split,
        detector=detector,
        classifier=classifier,
        reward=tuple(reward or ()),
        rewards_file=rewards_file,
        prompts=prompts,
        prompt_column=prompt_column,
        prompt_split=prompt_split,
        reference=reference,
        inception=inception,
    )
    given.check(suite)
    if json_file is not None and json_file.is_dir():
        raise UserError(f"--json {json_file}: that is a folder; give a file.")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.absolute().parent}.")
    without_loading_bars()
    from agsm_rl.evaluate.draw_folder import DrawingSettings
    from agsm_rl.evaluate.image_folder import is_image_folder
    from agsm_rl.evaluate.in_memory import evaluate_in_memory
    from agsm_rl.evaluate.on_disk import Options, evaluate_on_disk
    from agsm_rl.evaluate.target import open_target
    from agsm_rl.recipe.schema import Evaluate

    backbone = {key: value for key, value in (("dtype", dtype), ("resolution", resolution)) if value is not None}
    keeps = images or shard or against or is_image_folder(Path(target)) or target.endswith(".jsonl")
    if suite == "shapes" and not keeps:
        opened = open_target(target, base=base, options=backbone)
        how = {"seed": seed, "guidance": guidance, "num_steps": num_steps, "split": split or "held_out"}
        how |= {"bank": bank, "prompt_suffix": prompt_suffix, "num_images": num_images or 600}
        how |= {"batch_size": batch_size or Evaluate.model_fields["batch_size"].default}
        evaluate_in_memory(opened, compare=compare, json_file=json_file, **how)
        return
    if bank != "positive":
        raise UserError(f"--bank {bank}: goes with --suite shapes, without --images, --shard and --against.")
    options = Options(
        images=images,
        num_images=num_images,
        how=DrawingSettings(seed, guidance, num_steps, batch_size or DrawingSettings.batch_size, prompt_suffix),
        shard=shard,
        against=against,
        compare=compare,
        base=base,
        backbone=backbone,
    )
    allowed = permissions(imports=allow_import, commands=allow_command, hosts=allow_host)
    made = make_suite(suite, given, target=target, num_images=num_images, seed=seed, allow_imports=allowed)
    evaluate_on_disk(target, made, options, json_file=json_file)

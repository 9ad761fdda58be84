"""`agsm-rl sample`: its options in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from agsm_rl.cli.loading import loading_libraries
from agsm_rl.cli.options import (
    BankOption,
    BaseOption,
    GuidanceBankOption,
    GuidanceOption,
    GuidancePromptOption,
    ResolutionOption,
    StepsOption,
    TargetArgument,
    grouped,
    resolution_of,
)
from agsm_rl.cli.results import check_output_folder
from agsm_rl.errors import UserError
from agsm_rl.registry import permissions
from agsm_rl.run.screen import say, without_loading_bars
from agsm_rl.training.limits import MAX_BATCH, MAX_IMAGES, MAX_SEED


@dataclass(frozen=True)
class Prompts:
    """Prompts from a file."""

    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A .txt, .jsonl, .csv or .parquet file, or a `datasets` name.")
    ] = None
    prompt_column: Annotated[str | None, typer.Option(help="The column that holds the prompts.")] = None
    prompt_split: Annotated[str | None, typer.Option(help="The data set's split.")] = None
    num_prompts: Annotated[int | None, typer.Option(min=1, max=MAX_IMAGES, help="The first so many.")] = None

    def read(self, prompt: str | None) -> list[str]:
        """The texts to draw; UserError unless there is either PROMPT or --prompts."""
        if prompt is not None and self.prompts is not None:
            raise UserError("sample: got PROMPT and --prompts; give one of them.")
        if self.prompts is None:
            for name in ("prompt_column", "prompt_split", "num_prompts"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name.replace('_', '-')}: goes with --prompts FILE.")
            if prompt is None:
                raise UserError('sample: no prompt; give one in quotes ("a red star"), or --prompts FILE.')
            return [prompt]
        from agsm_rl.sources.prompt_lists import read_prompts

        read = read_prompts(
            self.prompts,
            column=self.prompt_column,
            split=self.prompt_split,
            limit=self.num_prompts,
            where="--prompts",
        )
        return [row.text for row in read]


@dataclass(frozen=True)
class Guidance:
    """Guidance."""

    guidance: GuidanceOption = None
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What guidance leads away from; the empty text by default.")
    ] = None
    bank: BankOption = "positive"
    guidance_bank: GuidanceBankOption = None
    guidance_prompt: GuidancePromptOption = None


@grouped
def sample(
    target: TargetArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw.")] = None,
    number: Annotated[int, typer.Option("-n", min=1, max=MAX_IMAGES, help="Pictures of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Picture i is drawn from the noise of seed + i.")] = 0,
    out: Annotated[
        Path, typer.Option("-o", help="Folder for the pictures; those that are there are kept, new ones get a number.")
    ] = Path("samples"),
    compare: Annotated[bool, typer.Option("--compare", help="Also draw with the base, from the same noise.")] = False,
    captions: Annotated[
        bool,
        typer.Option("--captions", help="Also write metadata.jsonl with the prompts: the folder is then a data set."),
    ] = False,
    num_steps: StepsOption = None,
    resolution: ResolutionOption = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Pictures drawn at a time.")] = 8,
    base: BaseOption = None,
    allow_import: Annotated[
        list[str] | None,
        typer.Option("--allow-import", metavar="MODULE", help="Let TARGET use code from this module. Repeatable."),
    ] = None,
    *,
    prompts: Prompts,
    guidance: Guidance,
) -> None:
    """Draw pictures, and a captioned grid of them where there are several."""
    check_output_folder(out, option="-o")
    texts = prompts.read(prompt)
    if len(texts) * number > MAX_IMAGES:
        raise UserError(f"sample: {len(texts)} prompts with {number} pictures each; at most {MAX_IMAGES:,} are drawn.")
    with loading_libraries():
        from agsm_rl.evaluate.sample import SampleOptions, draw_samples
        from agsm_rl.evaluate.target import open_target

        without_loading_bars()
    options = SampleOptions(
        number=number,
        seed=seed,
        guidance=guidance.guidance,
        num_steps=num_steps,
        negative_prompt=guidance.negative_prompt,
        batch_size=batch_size,
        bank=guidance.bank,
        guidance_bank=guidance.guidance_bank,
        guidance_prompt=guidance.guidance_prompt,
        compare=compare,
        captions=captions,
    )
    size = {} if resolution is None else {"resolution": resolution_of(resolution)}
    opened = open_target(target, base=base, options=size, allow_imports=permissions(imports=allow_import))
    draw_samples(opened, texts, out, options, tell=say)

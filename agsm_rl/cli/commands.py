"""The command line: parse, call, print. Heavy imports stand inside the commands, so that `agsm-rl list` is instant.

A mistake of the user's (UserError) ends with one message on stderr and exit code 2.
"""

from __future__ import annotations

import os
import platform
import warnings
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from agsm_rl import __version__
from agsm_rl.cli import launcher
from agsm_rl.cli.eval import evaluate
from agsm_rl.cli.list import list_names
from agsm_rl.cli.options import (
    AllowOption,
    BankOption,
    BaseOption,
    CommandOption,
    GuidanceOption,
    HostOption,
    RecipeArgument,
    SetOption,
    StepsOption,
    TargetArgument,
)
from agsm_rl.errors import UserError
from agsm_rl.files import local_path
from agsm_rl.run.screen import without_loading_bars
from agsm_rl.training.limits import MAX_SEED


class _Commands(TyperGroup):
    """Commands whose UserErrors are messages, not tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        from agsm_rl.run.stop import Ended

        try:
            return super().invoke(ctx)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.filename is None:  # no file's fault
                raise
            launcher.let_the_first_speak()
            typer.echo(f"agsm-rl: {error}", err=True)
            raise typer.Exit(2) from error
        except Ended as ended:
            if ended.tells:
                typer.echo(f"agsm-rl: {ended}", err=True)
            raise typer.Exit(ended.exit_code) from ended
        except KeyboardInterrupt as error:
            typer.echo("agsm-rl: interrupted", err=True)
            raise typer.Exit(130) from error


PATH_NAMES = ("recipe", "target", "base", "sweep_file", "against", "prompts", "detector", "classifier")
"""Parameters that are texts because they may also name a builtin or a repository on the hub."""


class _App(typer.Typer):
    """Commands in whose paths `~` is the home folder, also where the shell leaves it (`--run-dir=~/x`)."""

    def command(self, *names: Any, **options: Any) -> Any:
        register = super().command(*names, **options)
        return lambda function: register(_in_home(function))


def _in_home(function: Any) -> Any:
    def expanded(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(name, item) for item in value]
        if isinstance(value, Path):
            return local_path(value)
        is_path = isinstance(value, str) and value.startswith("~") and name in PATH_NAMES
        return str(local_path(value)) if is_path else value

    @wraps(function)
    def call(**given: Any) -> Any:
        return function(**{name: expanded(name, value) for name, value in given.items()})

    return call


app = _App(
    cls=_Commands,
    help="Post-train text-to-image diffusion models with objectives that compose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_versions(asked: bool) -> None:
    """The first line is ours; the others are what a bug report needs. Nothing is imported for it."""
    if not asked:
        return
    from importlib.metadata import version

    typer.echo(f"agsm-rl {__version__}")
    typer.echo(f"python {platform.python_version()} ({platform.system()} {platform.machine()})")
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate"):
        typer.echo(f"{name} {version(name)}")
    raise typer.Exit


@app.callback()
def _before_all(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    # Notices of the libraries about themselves are no messages to our users.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)


@app.command()
def train(
    recipe: RecipeArgument,
    run_dir: Annotated[Path | None, typer.Option(help="Default: runs/<recipe>-<time>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir (or beside RECIPE).")] = False,
    overrides: SetOption = None,
    allow_import: AllowOption = None,
    allow_command: CommandOption = None,
    allow_host: HostOption = None,
) -> None:
    """Train a recipe; ends with a table of base against trained."""
    from agsm_rl.recipe.earlier import read_earlier
    from agsm_rl.recipe.recipe import Recipe
    from agsm_rl.recipe.shipped import recipe_path
    from agsm_rl.registry import permissions

    path = recipe_path(recipe)
    allowed = permissions(imports=allow_import, commands=allow_command, hosts=allow_host)
    if resume and run_dir is None:
        if not any((path.parent / name).exists() for name in ("checkpoints", "metrics.jsonl", "adapter")):
            raise UserError(f"--resume: {path} is no run's recipe; say which run to continue by --run-dir.")
        run_dir = path.parent
    if resume and run_dir is not None and path.parent.resolve() == run_dir.resolve():  # the run's own recipe
        found = read_earlier(path, overrides or [], allow_imports=allowed)
    else:
        found = Recipe.from_yaml(path, overrides or [], allow_imports=allowed)
    from agsm_rl.run.lifecycle import train as train_recipe

    without_loading_bars()
    folder = train_recipe(found, run_dir, resume=resume, where=str(path), allow_imports=allowed)
    if launcher.is_first():
        typer.echo(f"run folder: {folder}")


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    allow_import: AllowOption = None,
    allow_command: CommandOption = None,
    allow_host: HostOption = None,
    fit_vram: Annotated[
        float | None,
        typer.Option(metavar="GB", min=0.001, help="Propose settings that fit this memory; exit code 1: none does."),
    ] = None,
) -> None:
    """Validate a recipe without running it: what would be trained, on what, and the memory it needs."""
    from agsm_rl.recipe.recipe import Recipe
    from agsm_rl.recipe.shipped import recipe_path
    from agsm_rl.registry import permissions

    path = recipe_path(recipe)
    allowed = permissions(imports=allow_import, commands=allow_command, hosts=allow_host)
    found = Recipe.from_yaml(path, overrides or [], allow_imports=allowed)
    # After the recipe is read: a misspelt key is told before torch and diffusers are loaded.
    from agsm_rl.cli.describe import describe, memory, proposal
    from agsm_rl.doctor.memory.fit import fit
    from agsm_rl.doctor.memory.predict import predict

    without_loading_bars()
    trainer, prediction = predict(found, where=str(path), allow_imports=allowed)
    typer.echo("\n".join([describe(found, trainer), *memory(trainer, prediction)]))
    fits = True
    if fit_vram is not None:
        if isinstance(prediction, str):
            raise UserError(f"--fit-vram: {path}: the memory cannot be predicted ({prediction}).")
        proposed = fit(found, prediction, fit_vram * 2**30, where=str(path), allow_imports=allowed)
        typer.echo(proposal(proposed, fit_vram * 2**30))
        fits = proposed.fits
    typer.echo(f"{path}: ok")
    if not fits:
        raise typer.Exit(1)


@app.command()
def doctor(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe (builtin:<name> too) or a run folder.")],
    overrides: SetOption = None,
    allow_import: AllowOption = None,
    allow_command: CommandOption = None,
    allow_host: HostOption = None,
) -> None:
    """Check that rewards, adapters, rollouts, gradients and files are as they should be; exit code 1 if any is not."""
    from agsm_rl.recipe.recipe import Recipe
    from agsm_rl.recipe.shipped import recipe_path
    from agsm_rl.registry import permissions

    run = Path(target) if (Path(target) / "recipe.yaml").is_file() else None
    path = recipe_path(target) if run is None else run / "recipe.yaml"
    allowed = permissions(imports=allow_import, commands=allow_command, hosts=allow_host)
    found = Recipe.from_yaml(path, overrides or [], allow_imports=allowed)
    from agsm_rl.doctor.diagnosis import diagnose

    without_loading_bars()
    bad = 0
    for finding in diagnose(found, run=run, where=str(path), allow_imports=allowed):
        bad += not finding.good
        typer.echo(str(finding))
    typer.echo(f"{path}: {'all is well' if not bad else f'{bad} red, see the remedies above'}")
    if bad:
        raise typer.Exit(1)


@app.command()
def sample(
    target: TargetArgument,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    number: Annotated[int, typer.Option("-n", min=1, help="How many pictures.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Picture i is drawn from the noise of seed + i.")] = 0,
    out: Annotated[Path, typer.Option("-o", help="Folder for the pictures.")] = Path("samples"),
    guidance: GuidanceOption = None,
    num_steps: StepsOption = None,
    bank: BankOption = "positive",
    base: BaseOption = None,
) -> None:
    """Draw pictures."""
    from agsm_rl.evaluate.drawing import draw, to_picture, write_picture
    from agsm_rl.evaluate.target import open_target

    without_loading_bars()
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"-o {out}: {place} is a file; give a folder.")
    opened = open_target(target, base=base)
    with opened.using(bank):
        images = draw(
            opened.backbone,
            [prompt] * number,
            [seed + index for index in range(number)],
            guidance=opened.guidance if guidance is None else guidance,
            num_steps=num_steps or opened.num_steps,
            batch_size=8,
        )
    for index, image in enumerate(images):
        path = out / f"seed-{seed + index}.png"
        write_picture(to_picture(image), path)
        typer.echo(str(path))


app.command(name="eval")(evaluate)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...|SWEEP", help="Run folders, or one sweep's folder.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", metavar="FILE.html", help="Default: report.html in the run's or sweep's folder; of several, here."
        ),
    ] = None,
) -> None:
    """Compare runs in one HTML file that needs no network: scores, differences, curves, images, recipes."""
    from agsm_rl.report.page import write_report

    file = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if file.is_dir():
        raise UserError(f"-o {file}: that is a folder; give a file.")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"-o {out}: there is no folder {out.absolute().parent}.")
    write_report(runs, file)
    typer.echo(str(file))


@app.command()
def sweep(
    sweep_file: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's YAML file, or builtin:study/<name>.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Cells at once. Default: 1; on Ray what fits.")] = None,
    executor: Annotated[Literal["local", "ray"], typer.Option(help="Processes here, or a Ray cluster.")] = "local",
    folder: Annotated[Path | None, typer.Option("--dir", help="Default: runs/<name>.")] = None,
    check_only: Annotated[bool, typer.Option("--check", help="Validate and list the cells; run nothing.")] = False,
    overrides: SetOption = None,
    allow_import: AllowOption = None,
    allow_command: CommandOption = None,
    allow_host: HostOption = None,
) -> None:
    """Run a recipe over axes and seeds; started again, it does what is unfinished. Exit code 1: a cell failed."""
    from agsm_rl.registry import permissions
    from agsm_rl.sweep.executors import open_executor
    from agsm_rl.sweep.plan import make_plan
    from agsm_rl.sweep.run import run_sweep

    allowed = permissions(imports=allow_import, commands=allow_command, hosts=allow_host)
    plan = make_plan(sweep_file, overrides or [], folder=folder, allow_imports=allowed)
    if check_only:
        for cell in plan.cells:
            limit = f"{cell.recipe.steps} steps" if cell.seconds is None else f"{cell.seconds:g} s"
            typer.echo(f"{cell.name}: {limit}" + (f", from {cell.after}" if cell.after else ""))
        typer.echo(f"{plan.where}: ok")
        return
    with open_executor(executor, workers=workers) as cells_run_on:
        board = run_sweep(plan, cells_run_on)
    typer.echo(f"sweep folder: {plan.folder}")
    if board.count("failed"):
        typer.echo(f"agsm-rl: {board.count('failed')} of {board.total} cells failed; run it again to retry.", err=True)
        raise typer.Exit(1)


app.command(name="list")(list_names)


@app.command()
def world(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    split: Annotated[str, typer.Option(help="train, validation or held_out")] = "train",
    num_images: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of what is drawn.")] = 0,
) -> None:
    """Write the shapes world to disk as an image folder that `datasets` reads."""
    from agsm_rl.shapes.data import write_image_folder

    write_image_folder(folder, split, num_images, seed)
    typer.echo(f"{folder}: {num_images} images with captions")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A run, an exported adapter, published .pth tokens, or kohya's LoRA.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors file; for .pth tokens a folder.")],
    to: Annotated[
        Literal["agsm-rl", "agsm", "softrepa", "kohya"] | None,
        typer.Option(
            help="agsm-rl: for attach(). agsm, softrepa: .pth tokens. kohya: LoRA for ComfyUI and A1111. "
            "Default: agsm-rl for a file; for a folder agsm, or softrepa where there is only one bank."
        ),
    ] = None,
) -> None:
    """Convert adapters from and to the files that their authors and other tools use."""
    from agsm_rl.export.convert import convert as convert_adapter

    for file in convert_adapter(source, out, to, tell=lambda line: typer.echo(line, err=True)):
        typer.echo(str(file))


@app.command(name="serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward: see `agsm-rl list rewards`.")],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="An option of the reward, e.g. version='\"2.1\"'. Repeatable."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; anything but loopback needs a token of yours.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8765,
    max_megabytes: Annotated[int, typer.Option(min=1, help="The largest request.")] = 256,
    allow_import: AllowOption = None,
) -> None:
    """Serve a reward over HTTP, for `rewards: {http: {url: …}}` here or elsewhere.

    Clients show a token: AGSM_RL_REWARD_TOKEN, or else one that is made and printed.
    """
    from agsm_rl.cli.serve_reward import serve

    serve(name, options or [], host=host, port=port, max_bytes=max_megabytes * 2**20, allow_imports=allow_import or [])

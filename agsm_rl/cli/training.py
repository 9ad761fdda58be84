"""The commands around a training: train, check, doctor, sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from agsm_rl.cli import launcher
from agsm_rl.cli.loading import loading_libraries
from agsm_rl.cli.options import Permissions, RecipeArgument, SetOption, TrainedArgument, grouped
from agsm_rl.errors import UserError
from agsm_rl.run.display import saying
from agsm_rl.run.screen import only_what_matters, say, without_loading_bars


@grouped
def train(
    recipe: TrainedArgument,
    run_dir: Annotated[Path | None, typer.Option(help="Default: runs/<recipe>-<time>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in RECIPE, or in --run-dir.")] = False,
    overrides: SetOption = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress: warnings, the results and the run's folder alone.")
    ] = False,
    *,
    allowed: Permissions,
) -> None:
    """Train a recipe; ends with a table of base against trained."""
    from agsm_rl.recipe.earlier import read_earlier
    from agsm_rl.recipe.recipe import Recipe
    from agsm_rl.recipe.shipped import recipe_path
    from agsm_rl.run.folder import RunFolder

    path, granted = recipe_path(recipe), allowed.granted()
    if path.is_dir():
        path = _recipe_of_run(path, resume=resume)
    if resume and run_dir is None:
        if not any((path.parent / name).exists() for name in ("checkpoints", "metrics.jsonl", "adapter")):
            raise UserError(f"--resume: {path} does not belong to a run; give the run's folder in place of it.")
        run_dir = path.parent
    is_own = resume and run_dir is not None and path.parent.resolve() == run_dir.resolve()  # the run's resolved recipe
    with only_what_matters(quiet):
        with saying("reading the recipe", enabled=launcher.is_first()), loading_libraries():
            loaded = (read_earlier if is_own else Recipe.from_yaml)(path, overrides or [], allow_imports=granted)
            from agsm_rl.recipe.places import check_places  # loads torch

            check_places(loaded, fresh=not resume)
        if run_dir is not None and launcher.is_first():  # before diffusers is loaded, which takes seconds
            folder = RunFolder(run_dir)
            folder.check(loaded, resume=resume)
            folder.close()
        with saying("loading torch and diffusers", enabled=launcher.is_first()), loading_libraries():
            from agsm_rl.run.lifecycle import train as train_recipe

            without_loading_bars()
        trained = train_recipe(loaded, run_dir, resume=resume)
    if launcher.is_first():
        say(f"run folder: {trained}")


def _recipe_of_run(folder: Path, *, resume: bool) -> Path:
    """The recipe of the run in a folder; UserError where there is none, or the run is not to be continued."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: is a folder without a run (it has no recipe.yaml); give a recipe's YAML file.")
    if not resume:
        raise UserError(
            f"{folder}: is a run's folder. To continue the run, add --resume; to train its recipe again, give {file} "
            "and another --run-dir."
        )
    return file


@grouped
def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    *,
    allowed: Permissions,
    fit_vram: Annotated[
        float | None,
        typer.Option(
            metavar="GB", min=0.001, help="Propose settings that fit this memory; exit code 1 if there are none."
        ),
    ] = None,
) -> None:
    """Validate a recipe without running it: what would be trained, on what, and the memory it needs."""
    from agsm_rl.recipe.recipe import Recipe
    from agsm_rl.recipe.shipped import recipe_path

    path, granted = recipe_path(recipe), allowed.granted()
    with loading_libraries():
        loaded = Recipe.from_yaml(path, overrides or [], allow_imports=granted)
        # Imported after the recipe is read: a misspelt key is reported before torch is loaded.
        from agsm_rl.recipe.places import check_places

        check_places(loaded)
        # And after that: a missing file is reported before diffusers is loaded.
        from agsm_rl.cli.describe import costs, describe, memory, proposal, unused
        from agsm_rl.doctor.memory.fit import fit
        from agsm_rl.doctor.memory.predict import predict
        from agsm_rl.evaluate.measured import entries_of
        from agsm_rl.run.sample_grids import grid_prompts

        without_loading_bars()
    grid_prompts(loaded)
    for entry in entries_of(loaded.evaluate, loaded.parts) if loaded.evaluate else []:
        entry.read_prompts()
    trainer, prediction = predict(loaded)
    rows = [*unused(loaded, trainer, prediction), *costs(loaded, prediction), *memory(trainer, prediction)]
    say("\n".join([describe(loaded, trainer), *rows]))
    fits = True
    if fit_vram is not None:
        if isinstance(prediction, str):
            raise UserError(f"--fit-vram: {path}: the memory cannot be predicted ({prediction}).")
        proposed = fit(loaded, prediction, fit_vram * 2**30)
        say(proposal(proposed, fit_vram * 2**30))
        fits = proposed.fits
    say(f"{path}: ok")
    if not fits:
        raise typer.Exit(1)


@grouped
def doctor(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe (builtin:<name> too) or a run folder.")],
    overrides: SetOption = None,
    *,
    allowed: Permissions,
) -> None:
    """Check that rewards, adapters, rollouts, gradients and files work as they should; exit code 1 if one does not."""
    from agsm_rl.recipe.earlier import read_earlier
    from agsm_rl.recipe.recipe import Recipe
    from agsm_rl.recipe.shipped import recipe_path

    run = Path(target) if (Path(target) / "recipe.yaml").is_file() else None
    path, granted = recipe_path(target) if run is None else run / "recipe.yaml", allowed.granted()
    loaded = (Recipe.from_yaml if run is None else read_earlier)(path, overrides or [], allow_imports=granted)
    with loading_libraries():
        from agsm_rl.doctor.diagnosis import diagnose

        without_loading_bars()
    red = 0
    for finding in diagnose(loaded, run=run):
        red += not finding.good
        say(str(finding))
    say(f"{path}: {'all is well' if not red else f'{red} red, see the remedies above'}")
    if red:
        raise typer.Exit(1)


@grouped
def sweep(
    sweep_file: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's YAML file, or builtin:study/<name>.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells to run at once. Default: 1; on Ray, as many as fit.")
    ] = None,
    executor: Annotated[Literal["local", "ray"], typer.Option(help="Processes here, or a Ray cluster.")] = "local",
    folder: Annotated[Path | None, typer.Option("--dir", help="Default: runs/<name>.")] = None,
    check_only: Annotated[bool, typer.Option("--check", help="Validate and list the cells; run nothing.")] = False,
    overrides: SetOption = None,
    *,
    allowed: Permissions,
) -> None:
    """Run a recipe over axes and seeds; run again, it continues. Exit code 1 if a cell failed."""
    from agsm_rl.recipe.shipped import recipe_path
    from agsm_rl.sweep.spec import read_sweep

    read_sweep(recipe_path(sweep_file), overrides or [])  # so that its mistakes are reported before torch is loaded
    from agsm_rl.sweep.executors import open_executor
    from agsm_rl.sweep.plan import make_plan
    from agsm_rl.sweep.run import run_sweep

    plan = make_plan(sweep_file, overrides or [], folder=folder, allow_imports=allowed.granted())
    if check_only:
        for cell in plan.cells:
            limit = f"{cell.recipe.steps} steps" if cell.seconds is None else f"{cell.seconds:g} s"
            say(f"{cell.name}: {limit}" + (f", from {cell.after}" if cell.after else ""))
        say(f"{plan.where}: ok")
        return
    with open_executor(executor, workers=workers) as cells_run_on:
        board = run_sweep(plan, cells_run_on)
    say(f"sweep folder: {plan.folder}")
    if board.count("failed"):
        say(f"agsm-rl: {board.count('failed')} of {board.total} cells failed; run it again to retry.", err=True)
        raise typer.Exit(1)

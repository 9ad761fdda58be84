"""The command line: `python -m agsm_rl.shapes.train_base KIND WORK_DIR OUT_DIR`."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from agsm_rl.backbones import backbone_of
from agsm_rl.backbones.loading import load_pipeline
from agsm_rl.errors import UserError
from agsm_rl.interfaces import Backbone
from agsm_rl.shapes.scenes import Requirement
from agsm_rl.shapes.train_base.autoencoder import train_autoencoder
from agsm_rl.shapes.train_base.denoiser import train_denoiser
from agsm_rl.shapes.train_base.inheritance import CAPTIONS, begin_as, begin_finer
from agsm_rl.shapes.train_base.layouts import Layout, layouts_of, make_text_tokenizer
from agsm_rl.shapes.train_base.stages import Settings, draw_data
from agsm_rl.shapes.train_base.text import train_text_encoder
from agsm_rl.shapes.train_base.words import train_by_words
from agsm_rl.shapes.worlds import SCENES, WORLDS

app = typer.Typer(add_completion=False)


@app.command()
def main(
    kind: Annotated[Literal["sd15", "sdxl", "sd3"], typer.Argument(help="the pipeline's layout")],
    work: Annotated[Path, typer.Argument(help="where data, checkpoints and the log are kept")],
    out: Annotated[Path, typer.Argument(help="where the pipeline folder is written")],
    world: Annotated[Literal["shapes", "scenes"], typer.Option(help="the drawn world")] = "shapes",
    scenes: int = Settings.scenes,
    vae_steps: int = Settings.vae_steps,
    text_steps: int = Settings.text_steps,
    denoiser_steps: int = Settings.denoiser_steps,
    batch_size: Annotated[int, typer.Option(help="images a step", min=1)] = Settings.batch_size,
    judge_every: Annotated[
        int,
        typer.Option(help="denoiser steps between two looks at validation prompts, each of which writes OUT; 0: never"),
    ] = Settings.judge_every,
    judge_prompts: Annotated[int, typer.Option(help="prompts of each tag in such a look", min=1)] = (
        Settings.judge_prompts
    ),
    up_text_dropout: Annotated[
        float, typer.Option(help="share of the images whose prompt a U-Net's up blocks do not see", min=0, max=1)
    ] = Settings.up_text_dropout,
    careless_plain: Annotated[
        float | None,
        typer.Option(help="share of the plain captions that are careless; the world's when left out", min=0, max=1),
    ] = Settings.careless_plain,
    seed: int = Settings.seed,
    vae: Annotated[Path | None, typer.Option(help="a base made before, whose autoencoder is taken")] = None,
    begin_vae: Annotated[
        Path | None, typer.Option(help="a base made before, whose autoencoder is trained on; of any world")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="a base made before, whose text encoders are taken")] = None,
    begin: Annotated[Path | None, typer.Option(help="a base of this kind, whose denoiser is trained on")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="a base with a U-Net of the same blocks, latents and schedule: begins as it, learns from it"),
    ] = None,
    coarser: Annotated[
        Path | None,
        typer.Option(help="a base of SD3's layout with a token per patch, of the same --vae and --text, to begin with"),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="the denoiser's; its layout's when left out")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; fixed, because sums depend on their order")] = 2,
) -> None:
    """Train a base of a drawn world and write its pipeline folder."""
    _check(kind, begin, vae=vae, text=text, teacher=teacher, coarser=coarser)
    torch.set_num_threads(threads)
    sizes = (scenes, vae_steps, text_steps, denoiser_steps, batch_size)
    settings = Settings(*sizes, up_text_dropout, careless_plain, seed, judge_every, judge_prompts, WORLDS[world])
    layout = _layout(settings, kind, learning_rate)
    work.mkdir(parents=True, exist_ok=True)
    drawn, images = draw_data(settings, work)
    begun_with = None if coarser is None else _coarser(coarser)
    made = partial(_assemble, settings, layout, work, images, vae=vae, begin_vae=begin_vae, text=text)
    pipeline = made() if begin is None else load_pipeline(str(begin), dtype=torch.float32)
    backbone = backbone_of(pipeline)
    taught_by = None if teacher is None else _begin_as(teacher, backbone, [scene.requirement for scene in drawn])
    if begun_with is not None:
        begin_finer(begun_with, pipeline.transformer)
    name, keep = f"denoiser_{kind}", partial(_write, pipeline, backbone, layout.stored, work, out)
    train_denoiser(settings, work, name, layout, backbone, drawn, images, teacher=taught_by, keep=keep)
    keep()


def _layout(settings: Settings, kind: str, learning_rate: float | None) -> Layout:
    layouts = layouts_of(settings.world)
    if kind not in layouts:
        raise typer.BadParameter(f"the world {settings.world.name} has bases of the layouts {', '.join(layouts)}")
    return layouts[kind] if learning_rate is None else replace(layouts[kind], learning_rate=learning_rate)


def _check(kind: str, begin: Path | None, **others: Path | None) -> None:
    """BadParameter for options that cannot go together."""
    if begin is not None and any(part is not None for part in others.values()):
        raise typer.BadParameter("--begin has all parts of its own: leave out --vae, --text, --teacher and --coarser")
    if others["coarser"] and (kind != "sd3" or others["teacher"]):
        raise typer.BadParameter("--coarser: only for sd3, and not beside --teacher, whose weights it would replace")


def _coarser(base: Path) -> Any:
    """The transformer of `--coarser`, whose tokens are patches; BadParameter for anything else."""
    found = getattr(load_pipeline(str(base), dtype=torch.float32), "transformer", None)
    if getattr(getattr(found, "config", None), "patch_size", 1) < 2:
        raise typer.BadParameter(
            f"--coarser: {base} has no transformer with tokens for patches of 2 x 2 latents or more"
        )
    return found


def _begin_as(teacher: Path, backbone: Backbone, requirements: list[Requirement]) -> Backbone:
    """The teacher, whose weights the backbone's U-Net begins with."""
    taught_by = backbone_of(load_pipeline(str(teacher), dtype=torch.float32))
    fitted = begin_as(taught_by, backbone, requirements[:CAPTIONS])
    print(f"the teacher's text, made of the student's: R² {fitted:.3f}")
    return taught_by


def _assemble(
    settings: Settings,
    layout: Layout,
    work: Path,
    images: Tensor,
    *,
    vae: Path | None,
    begin_vae: Path | None,
    text: Path | None,
) -> Any:
    """The pipeline with a denoiser of random weights, after the stages before it or with what they made before."""
    if vae is None:
        begun = None if begin_vae is None else AutoencoderKL.from_pretrained(begin_vae, subfolder="vae")
        autoencoder = train_autoencoder(settings, work, images, begun)
    else:
        autoencoder = AutoencoderKL.from_pretrained(vae, subfolder="vae").requires_grad_(False).eval()
    made = None if text is None else load_pipeline(str(text), dtype=torch.float32)
    world = settings.world
    if made is None:
        train_reader = train_by_words if world is SCENES else train_text_encoder
        encoders = [
            train_reader(settings, work, name, reader, make_text_tokenizer(reader, world))
            for name, reader in layout.readers.items()
        ]
    else:
        parts = [part for name, part in made.components.items() if name.startswith("text_encoder")]
        encoders = [part.requires_grad_(False).eval() for part in parts]
    torch.manual_seed(settings.seed + 3)
    pipeline = layout.assemble(autoencoder, *encoders, world=world)
    if made is not None:  # its own tokenizers: those made here may give parts of words other numbers
        tokenizers = {name: part for name, part in made.components.items() if name.startswith("tokenizer")}
        pipeline.register_modules(**tokenizers)
    return pipeline


def _write(pipeline: Any, backbone: Backbone, stored: torch.dtype, work: Path, out: Path) -> None:
    """Write the pipeline folder with the denoiser as it is, and the log so far."""
    backbone.denoiser.to(stored)
    pipeline.save_pretrained(out)
    backbone.denoiser.float()
    _name_as_published(out / "text_encoder" / "model.safetensors")
    _forget_places(out)
    shutil.copy(work / "log.jsonl", out / "training_log.jsonl")


def _name_as_published(file: Path) -> None:
    """Give a CLIPTextModel's weights the names that every version of transformers reads; 5 leaves their prefix out."""
    weights = load_file(file)
    if "embeddings.token_embedding.weight" in weights:
        save_file({f"text_model.{name}": part for name, part in weights.items()}, file, metadata={"format": "pt"})


LOADED_FROM = ("_name_or_path", "is_local", "local_files_only")


def _forget_places(folder: Path) -> None:
    """Take out of a base's configurations from where on this machine its parts were loaded."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if [name for name in LOADED_FROM if content.pop(name, None) is not None]:
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

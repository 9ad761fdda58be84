"""This process's share of an evaluation on disk: take or draw the targets' images, and measure them with a suite."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings, Share, draw_images, image_of, plan, read_pinned
from agsm_rl.evaluate.image_folder import Drawn, is_image_folder, pictures_in, read_images
from agsm_rl.evaluate.progress import progress
from agsm_rl.evaluate.stored_suite import StoredSuite as Suite
from agsm_rl.evaluate.suites.geneval import GenEvalResult, read_results
from agsm_rl.evaluate.target import Target, open_target
from agsm_rl.run.screen import make_console

MEASURED_AT_ONCE = 16


@dataclass(frozen=True)
class OnDiskOptions:
    """What to draw, where to keep it, and what to compare with.

    Attributes:
        images: The folder that keeps drawn images; a temporary one by default.
        num_images: How many images to draw; None is the suite's number.
        drawing: How images are drawn.
        share: `i/n`, this process's share of the drawing and measuring.
        against: Another target to compare with.
        compare: Compare with the target's own base.
        base: The base to use the target on.
        backbone: Options of the backbone, which take precedence over the target's.
        allow_imports: Modules whose code a target may name.
    """

    images: Path | None = None
    num_images: int | None = None
    drawing: DrawingSettings = DrawingSettings()
    share: str | None = None
    against: str | None = None
    compare: bool = False
    base: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    allow_imports: frozenset[str] = frozenset()


@dataclass
class TargetImages:
    """A target's images, or the results that another tool computed from them.

    Attributes:
        name: The target as the user gave it.
        images: The images; empty if there are only results.
        drawing: The settings that decided the images, if they are known.
        results: Results read from a results.jsonl.
        folder: The folder that keeps the images; None if it is temporary.
    """

    name: str
    images: list[Drawn]
    drawing: dict[str, Any] | None
    results: GenEvalResult | None = None
    folder: Path | None = None


@dataclass
class SuiteProcess:
    """Draws and measures this process's share of each target's images.

    `gathers` tells whether this process computes the result once all shares are done.
    """

    suite: Suite
    options: OnDiskOptions
    share: Share
    gathers: bool
    console: Console
    accelerator: Any = None
    target: Target | None = None

    @staticmethod
    def begin(suite: Suite, options: OnDiskOptions) -> SuiteProcess:
        """A process with the share that the options or accelerate's processes give it."""
        if options.share is not None:
            return SuiteProcess(suite, options, Share.parse(options.share), False, make_console(stderr=True))
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return SuiteProcess(suite, options, Share(), True, make_console(stderr=True))
        from agsm_rl.training.processes import make_accelerator

        if options.images is None:
            raise UserError("--images: several processes need a shared folder; give one.")
        accelerator = make_accelerator()
        main = accelerator.is_main_process
        share = Share(accelerator.process_index, accelerator.num_processes)
        return SuiteProcess(suite, options, share, main, make_console(stderr=True, quiet=not main), accelerator)

    def wait(self) -> None:
        """Wait for the other processes, if there are any."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def images_of(self, target: str | None, folder: Path, *, like: TargetImages | None = None) -> TargetImages:
        """A target's images, after drawing and measuring this share of them.

        Args:
            target: The target; None is the base of the previous one.
            folder: Where images are drawn.
            like: Images to compare with, whose prompts, noise, guidance and steps are used.
        """
        if target is not None and target.endswith(".jsonl"):
            if self.suite.name != "geneval":
                raise UserError(f"{target}: only --suite geneval reads results; give a folder of images.")
            return TargetImages(target, [], None, read_results(Path(target)))
        images = self._existing(target) if target is not None else None
        if images is None:
            images = self._draw(target, folder, like)
        self._measure(images.images)
        return images

    def _existing(self, target: str) -> TargetImages | None:
        """Images that exist already; None if the target is a model."""
        path = Path(target)
        if is_image_folder(path):
            if self.options.num_images is not None:
                raise UserError(f"--num-images: all images in the folder {target} are evaluated; leave the option out.")
            images = read_images(path)
            drawing = read_pinned(path)
            if drawing is not None and len(images) < drawing["num_images"]:
                raise UserError(
                    f"{target}: only {len(images)} of its {drawing['num_images']} images are drawn. Run the command "
                    "that draws them again (with each --shard, if it was split)."
                )
            self.suite.check(images)
            return TargetImages(target, images, drawing, folder=path)
        if is_plain_folder(target, self.suite):
            images = [Drawn(picture, 0, k, {"prompt": ""}) for k, picture in enumerate(pictures_in(path))]
            return TargetImages(target, images, None)
        return None

    def _draw(self, target: str | None, folder: Path, like: TargetImages | None) -> TargetImages:
        settings = self.options.drawing
        if target is None or target == self.options.against:
            # The other target is drawn by its own settings; a base has no banks.
            settings = replace(settings, guidance_bank=None, guidance_prompt=None)
        if like is not None and like.images:
            settings = _as_drawn(settings, like.drawing or {})
            planned = [image_of(folder, item.prompt_index, item.number, item.metadata) for item in like.images]
        else:
            planned = plan(folder, self.suite.asked(), self.options.num_images or self.suite.num_images)
        self.suite.prepare()
        if target is None:
            self._switch_to_base()
        else:
            self.target = None  # two models need not be in memory at once
            resolution = (like.drawing or {}).get("resolution") if like is not None else None
            base = self.options.base if target != self.options.against else None
            options, allowed = self._backbone(resolution), self.options.allow_imports
            self.target = open_target(target, base=base, options=options, allow_imports=allowed)
        assert self.target is not None
        drawing = draw_images(planned, folder, self.target, settings, self.share, console=self.console)
        return TargetImages(self.target.name, planned, drawing, folder=folder if self.options.images else None)

    def _switch_to_base(self) -> None:
        """Turn the open target into its own base."""
        assert self.target is not None
        if self.target.handle is None:
            raise UserError("--compare: the target is a base itself; give a run folder or an exported adapter.")
        self.target.handle.detach()
        self.target.name, self.target.files = f"base of {self.target.name}", ()

    def _backbone(self, resolution: int | None) -> dict[str, Any]:
        options = ({"resolution": resolution} if resolution else {}) | self.options.backbone
        return options | ({"device": str(self.accelerator.device)} if self.accelerator is not None else {})

    def _measure(self, images: list[Drawn]) -> None:
        mine = self.share.of(images)
        pending = self.suite.pending(mine)
        if not pending:
            return
        self.suite.prepare()
        done = len(mine) - len(pending)
        with progress(f"measuring {self.suite.name}", total=len(mine), done=done, console=self.console) as advance:
            for start in range(0, len(pending), MEASURED_AT_ONCE):
                part = pending[start : start + MEASURED_AT_ONCE]
                self.suite.measure(part)
                advance(len(part))


def is_drawn(target: str) -> bool:
    """Whether a target is existing images, or their results."""
    return is_image_folder(Path(target)) or target.endswith(".jsonl")


def is_plain_folder(target: str, suite: Suite) -> bool:
    """Whether a target is a folder of pictures without prompts, which only FID can use; a model's may hold some too."""
    path = Path(target)
    return suite.name == "fid" and bool(pictures_in(path)) and not (path / "model_index.json").is_file()


def _as_drawn(settings: DrawingSettings, drawing: dict[str, Any]) -> DrawingSettings:
    """The settings of the images to compare with, so that guidance, steps and suffix do not cause a difference."""
    return replace(
        settings,
        seed=drawing.get("seed", settings.seed),
        guidance=drawing.get("guidance") if settings.guidance is None else settings.guidance,
        num_steps=settings.num_steps or drawing.get("num_steps"),
        prompt_suffix=drawing.get("prompt_suffix", settings.prompt_suffix),
    )

"""This process's share of `agsm-rl eval`: take or draw the targets' images, and have a suite judge them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings, Share, draw_images, image_of, pinned, plan, read_pinned
from agsm_rl.evaluate.image_folder import METADATA, Drawn, is_image_folder, pictures_in, read_images
from agsm_rl.evaluate.kept_rows import KeptRows, judged_in_memory
from agsm_rl.evaluate.measure import draw_and_judge
from agsm_rl.evaluate.progress import progress
from agsm_rl.evaluate.suite import Asked, Judged, Result, Suite
from agsm_rl.evaluate.target import Target, open_target
from agsm_rl.run.screen import make_console
from agsm_rl.training.processes import Processes

JUDGED_AT_ONCE = 16


@dataclass(frozen=True)
class EvalOptions:
    """What to draw, where to keep it, and what to compare with.

    Attributes:
        images: The folder that keeps drawn images; None keeps none.
        num_images: How many images were asked for; None is the suite's number.
        drawing: How images are drawn.
        share: `i/n`, this process's share of the drawing and measuring.
        against: Another target to compare with.
        compare: Compare with the target's own base.
        base: The base to use the target on.
        backbone: Options of the backbone, which take precedence over the target's.
        suite_flags: The options given to the suite: how the user wrote each, by its name in the suite's constructor.
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
    suite_flags: Mapping[str, str] = field(default_factory=dict)
    allow_imports: frozenset[str] = frozenset()


@dataclass
class TargetImages:
    """A target's images with what is said of them, or the results that another tool computed from them.

    Attributes:
        name: The target as the user gave it.
        drawing: The settings that decided the images, if they are known.
        files: The images in a folder; empty if none are kept.
        judged: The rows of images that are not kept in a folder of ours.
        results: The result that was read from a .jsonl file.
        folder: The folder that keeps the images.
        has_prompts: Whether it is known what the images were drawn for.
    """

    name: str
    drawing: dict[str, Any] | None = None
    files: list[Drawn] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    results: Result | None = None
    folder: Path | None = None
    has_prompts: bool = True

    @property
    def asked(self) -> list[Asked]:
        """What was drawn, if that is known."""
        if not self.has_prompts:
            return []
        return [Asked(item.prompt_index, item.number, item.metadata) for item in self.files or self.judged]


@dataclass
class SuiteProcess:
    """Draws and measures this process's share of each target's images.

    `gathers` tells whether this process computes the result once all shares are done.
    """

    suite: Suite
    options: EvalOptions
    share: Share
    gathers: bool
    console: Console
    accelerator: Any = None
    target: Target | None = None

    @staticmethod
    def begin(suite: Suite, options: EvalOptions) -> SuiteProcess:
        """A process with the share that the options or accelerate's processes give it."""
        if options.share is not None:
            return SuiteProcess(suite, options, Share.parse(options.share), False, make_console(stderr=True))
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return SuiteProcess(suite, options, Share(), True, make_console(stderr=True))
        from agsm_rl.training.processes import make_accelerator

        accelerator = make_accelerator()
        main = accelerator.is_main_process
        share = Share(accelerator.process_index, accelerator.num_processes)
        return SuiteProcess(suite, options, share, main, make_console(stderr=True, quiet=not main), accelerator)

    def wait(self) -> None:
        """Wait for the other processes, if there are any."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def result(self, images: TargetImages) -> Result:
        """The result of a target, once all shares are done."""
        if images.results is not None:
            return images.results
        result = self.suite.result(images.judged or KeptRows(self.suite).read(images.files))
        if images.folder is not None:
            self.suite.write_results(result, images.folder)
        return result

    def images_of(
        self, target: str | None, folder: Path | None, like: TargetImages | None = None, *, is_other: bool = False
    ) -> TargetImages:
        """The target's images, taken or drawn, with this process's share judged.

        Args:
            target: The target; None is the base of the previous one.
            folder: Where drawn images are kept; None keeps none.
            like: Images to compare with, whose prompts, noise, guidance and steps are used.
            is_other: Whether it is what TARGET is compared with: drawn with its own base and bank, even if it is the
                same model.
        """
        if target is not None and target.endswith(".jsonl"):
            return TargetImages(target, results=self.suite.read_results(Path(target)))
        images = self._existing(target) if target is not None else None
        return images or self._drawn(target, folder, like, is_other)

    def _existing(self, target: str) -> TargetImages | None:
        """Images that exist already; None if the target is a model."""
        path = Path(target)
        if is_image_folder(path):
            if self.options.num_images is not None:
                raise UserError(f"--num-images: all images in the folder {target} are evaluated; leave the option out.")
            files = read_images(path)
            drawing = read_pinned(path)
            if drawing is not None and len(files) < drawing["num_images"]:
                raise UserError(
                    f"{target}: only {len(files)} of its {drawing['num_images']} images are drawn. Run the command "
                    "that draws them again (with each --shard, if it was split)."
                )
            for item in {item.prompt_index: item for item in files}.values():
                self._check(item)
            self._judge(files)
            return TargetImages(target, drawing, files, folder=path)
        if is_plain_folder(target, self.suite):
            files = [Drawn(picture, 0, k, {"prompt": ""}) for k, picture in enumerate(pictures_in(path))]
            self.suite.prepare()
            judged = judged_in_memory(self.suite, files, at_once=JUDGED_AT_ONCE)
            return TargetImages(target, judged=judged, has_prompts=False)
        return None

    def _check(self, item: Drawn) -> None:
        try:
            self.suite.check(item.metadata)
        except UserError as error:
            raise UserError(f"{item.path.parents[1] / METADATA}: {error}") from error

    def _drawn(
        self, target: str | None, folder: Path | None, like: TargetImages | None, is_other: bool
    ) -> TargetImages:
        settings = self.options.drawing
        if is_other:  # drawn by its own settings; a base has no banks
            settings = replace(settings, bank="positive", guidance_bank=None, guidance_prompt=None)
        asked = [] if like is None else like.asked
        if like is not None and asked:
            settings = _as_drawn(settings, like.drawing or {})
        else:
            asked = plan(self.suite.prompts(), self.suite.num_images)
            for item in {item.prompt_index: item for item in asked}.values():
                self.suite.check(item.metadata)
        self.suite.prepare()
        opened = self._open(target, like, None if is_other else self.options.base)
        if folder is None:
            return self._in_memory(opened, asked, settings)
        files = [image_of(folder, item) for item in asked]
        drawing = draw_images(self.suite, files, folder, opened, settings, self.share, console=self.console)
        self._judge(files)
        return TargetImages(opened.name, drawing, files, folder=folder)

    def _open(self, target: str | None, like: TargetImages | None, base: str | None) -> Target:
        """The target, or the base of the one that is open."""
        if target is None:
            assert self.target is not None and self.target.handle is not None
            self.target.handle.detach()
            self.target.name, self.target.files = f"base of {self.target.name}", ()
            return self.target
        self.target = None  # two models need not be in memory at once
        resolution = (like.drawing or {}).get("resolution") if like is not None else None
        self.target = open_target(
            target,
            base=base,
            options=self._backbone(resolution),
            allow_imports=self.options.allow_imports,
            check_base=self.suite.check_base,
        )
        if self.options.compare and self.target.handle is None:
            raise UserError("--compare: the target is a base itself; give a run folder or an exported adapter.")
        return self.target

    def _in_memory(self, opened: Target, asked: list[Asked], settings: DrawingSettings) -> TargetImages:
        with opened.using(settings.bank, settings.guidance_bank, settings.guidance_prompt):
            drawing = pinned(opened, settings)
            how = replace(settings, guidance=drawing["guidance"], num_steps=drawing["num_steps"])
            processes = None if self.accelerator is None else Processes(self.accelerator)
            share = len(asked) if processes is None else -(-len(asked) // processes.count)
            with progress(f"evaluating {opened.name}", total=share, console=self.console) as advance:
                drawn = draw_and_judge(
                    opened.backbone, [self.suite], how, asked=asked, processes=processes, advance=advance
                )
        return TargetImages(opened.name, drawing, judged=drawn.judged[0])

    def _backbone(self, resolution: int | None) -> dict[str, Any]:
        options = ({"resolution": resolution} if resolution else {}) | self.options.backbone
        return options | ({"device": str(self.accelerator.device)} if self.accelerator is not None else {})

    def _judge(self, files: list[Drawn]) -> None:
        """Judge this process's share of the images in a folder, unless it has been judged."""
        mine, kept = self.share.of(files), KeptRows(self.suite)
        pending = kept.pending(mine)
        if not pending:
            return
        self.suite.prepare()
        done = len(mine) - len(pending)
        with progress(f"measuring {self.suite.name}", total=len(mine), done=done, console=self.console) as advance:
            for start in range(0, len(pending), JUDGED_AT_ONCE):
                part = pending[start : start + JUDGED_AT_ONCE]
                kept.judge(part)
                advance(len(part))


def is_drawn(target: str) -> bool:
    """Whether a target is existing images, or their results."""
    return is_image_folder(Path(target)) or target.endswith(".jsonl")


def is_plain_folder(target: str, suite: Suite) -> bool:
    """Whether a target is a folder of pictures that the suite judges without prompts; a model's may hold some too."""
    path = Path(target)
    return not suite.needs_prompts and bool(pictures_in(path)) and not (path / "model_index.json").is_file()


def _as_drawn(settings: DrawingSettings, drawing: dict[str, Any]) -> DrawingSettings:
    """The settings of the images to compare with, so that guidance, steps and suffix do not cause a difference."""
    return replace(
        settings,
        seed=drawing.get("seed", settings.seed),
        guidance=drawing.get("guidance") if settings.guidance is None else settings.guidance,
        num_steps=settings.num_steps or drawing.get("num_steps"),
        prompt_suffix=drawing.get("prompt_suffix", settings.prompt_suffix),
    )

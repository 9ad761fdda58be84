"""`agsm-rl eval` over images that are kept: draw them (or take them as they are), measure each, tell the figures."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import DrawingSettings, Share, draw_images, image_of, plan, read_pinned, versions
from agsm_rl.evaluate.image_folder import Drawn, is_image_folder, pictures_in, read_images
from agsm_rl.evaluate.progress import progress
from agsm_rl.evaluate.suite import Result, Suite
from agsm_rl.evaluate.suites.geneval import RESULTS, GenEvalResult, read_results, write_results
from agsm_rl.evaluate.target import Target, open_target
from agsm_rl.files import write_text
from agsm_rl.run.screen import make_console, tell

MEASURED_AT_ONCE = 16


@dataclass(frozen=True)
class Options:
    """How `evaluate_on_disk` goes about it.

    images: where drawn images are kept (a temporary folder where none is given). against: another target to compare
    with; compare: the target's own base instead. shard: `i/n`, this process's share of drawing and measuring.
    """

    images: Path | None = None
    num_images: int | None = None
    how: DrawingSettings = DrawingSettings()
    shard: str | None = None
    against: str | None = None
    compare: bool = False
    base: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)


def evaluate_on_disk(target: str, suite: Suite, options: Options, *, json_file: Path | None = None) -> dict[str, Any]:
    """Measure a target on a suite; prints its table and returns (and writes) eval.json's content.

    With a share of the work (`shard`) only that share is drawn and measured, and {} is returned; the same command
    without it gathers what all shares left in `images`. Under `accelerate launch` the first process gathers.
    """
    _check_options(target, suite, options)
    work = _Work.begin(suite, options)
    with _image_place(options) as place:
        other = None
        if options.against and is_image_folder(Path(options.against)) and not _is_drawn(target):
            other = work.on(options.against, place)  # what is drawn is drawn as these were
        found = work.on(target, place, like=other)
        if other is None and (options.against or options.compare):
            other = work.on(options.against, place / ("against" if options.against else "base"), like=found)
        work.wait()
        if not work.gathers and options.shard is None:
            return {}
        if not work.gathers:
            folder = options.images or target
            tell(
                work.console,
                f"share {options.shard} is drawn and measured; when all are, `agsm-rl eval {folder} --suite "
                f"{suite.name}` (or this command without --shard) gives the figures.",
            )
            return {}
        content = _tell(found, other, work)
    if json_file is not None:
        _relate(content, json_file.parent)
        write_text(json_file, json.dumps(content, indent=1) + "\n")
    return content


@dataclass
class _Found:
    """What one target is measured by: images, or the results that another tool made of them."""

    name: str
    images: list[Drawn]
    drawing: dict[str, Any] | None
    results: GenEvalResult | None = None
    folder: Path | None = None


@dataclass
class _Work:
    """A suite's work in this process."""

    suite: Suite
    options: Options
    shard: Share
    gathers: bool
    console: Console
    processes: Any = None
    target: Target | None = None

    @staticmethod
    def begin(suite: Suite, options: Options) -> _Work:
        """By the options, or by accelerate's processes."""
        if options.shard is not None:
            return _Work(suite, options, Share.parse(options.shard), False, make_console(stderr=True))
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return _Work(suite, options, Share(), True, make_console(stderr=True))
        from agsm_rl.training.processes import make_accelerator

        if options.images is None:
            raise UserError("--images: several processes need a folder to share; name one.")
        processes = make_accelerator()
        main = processes.is_main_process
        shard = Share(processes.process_index, processes.num_processes)
        return _Work(suite, options, shard, main, make_console(stderr=True, quiet=not main), processes)

    def wait(self) -> None:
        """For the other processes, where there are any."""
        if self.processes is not None:
            self.processes.wait_for_everyone()

    def on(self, target: str | None, place: Path, *, like: _Found | None = None) -> _Found:
        """Have this share of a target's images drawn and measured; None is the base of the target before.

        like: images that these are to be compared with: the same prompts, noise, guidance and steps.
        """
        if target is not None and target.endswith(".jsonl"):
            if self.suite.name != "geneval":
                raise UserError(f"{target}: results of images are read by --suite geneval only; give a folder.")
            return _Found(target, [], None, read_results(Path(target)))
        found = self._taken(target) if target is not None else None
        if found is None:
            found = self._drawn(target, place, like)
        self._measure(found.images)
        return found

    def _taken(self, target: str) -> _Found | None:
        """Images that are there already; None if the target is something that draws."""
        path = Path(target)
        if is_image_folder(path):
            if self.options.num_images is not None:
                raise UserError(
                    f"--num-images: {target} is a folder of images, which is evaluated whole; leave it out."
                )
            images = read_images(path)
            drawing = read_pinned(path)
            if drawing is not None and len(images) < drawing["num_images"]:
                raise UserError(
                    f"{target}: {len(images)} of its {drawing['num_images']} images are drawn; go on with the command "
                    "that draws them (its other shares, if it was shared)."
                )
            self.suite.check(images)
            return _Found(target, images, drawing, folder=path)
        if _is_plain(target, self.suite):
            images = [Drawn(picture, 0, k, {"prompt": ""}) for k, picture in enumerate(pictures_in(path))]
            return _Found(target, images, None)
        return None

    def _drawn(self, target: str | None, place: Path, like: _Found | None) -> _Found:
        how = self.options.how
        if like is not None and like.images:
            how = _as_drawn(how, like.drawing or {})
            wanted = [image_of(place, item.prompt_index, item.number, item.metadata) for item in like.images]
        else:
            wanted = plan(place, self.suite.asked(), self.options.num_images or self.suite.num_images)
        self.suite.prepare()
        if target is None:
            assert self.target is not None
            if self.target.handle is None:
                raise UserError("--compare: the target is a base itself; give a run folder or an exported adapter.")
            self.target.handle.detach()
            self.target.name, self.target.files = f"base of {self.target.name}", ()
        else:
            # Not two models in memory.
            self.target = None
            resolution = (like.drawing or {}).get("resolution") if like is not None else None
            self.target = open_target(target, base=self._base(target), options=self._backbone(resolution))
        drawing = draw_images(wanted, place, self.target, how, self.shard, console=self.console)
        return _Found(self.target.name, wanted, drawing, folder=place if self.options.images else None)

    def _base(self, target: str) -> str | None:
        return self.options.base if target != self.options.against else None

    def _backbone(self, resolution: int | None) -> dict[str, Any]:
        found = ({"resolution": resolution} if resolution else {}) | self.options.backbone
        return found | ({"device": str(self.processes.device)} if self.processes is not None else {})

    def _measure(self, images: list[Drawn]) -> None:
        own = self.shard.of(images)
        left = self.suite.pending(own)
        if not left:
            return
        self.suite.prepare()
        done = len(own) - len(left)
        with progress(f"measuring {self.suite.name}", total=len(own), done=done, console=self.console) as advance:
            for start in range(0, len(left), MEASURED_AT_ONCE):
                part = left[start : start + MEASURED_AT_ONCE]
                self.suite.measure(part)
                advance(len(part))


def _stdout() -> Console:
    """A pipe or a file is given whole tables, however wide; a terminal shortens what does not fit."""
    console = make_console()
    return console if console.is_terminal else make_console(width=10_000)


def _tell(found: _Found, other: _Found | None, work: _Work) -> dict[str, Any]:
    """Print the tables, write results.jsonl, and make eval.json's content."""
    result = _result(found, work)
    rest = None if other is None else _result(other, work)
    result.show(_stdout(), rest)
    content = result.to_json() | _described(found) | {"versions": versions()}
    if other is not None and rest is not None:
        same = found.drawing is not None and other.drawing is not None
        same = same and all(found.drawing[key] == other.drawing[key] for key in ("seed", "resolution"))  # type: ignore[index]
        content["base" if work.options.compare else "other"] = rest.to_json() | _described(other)
        content |= {"same_noise": same, **result.against(rest)}
    return content


def _relate(content: dict[str, Any], folder: Path) -> None:
    """Have the images' files told from the JSON's own folder, so that both can be moved together."""
    for part in (content, content.get("base", {}), content.get("other", {})):
        for row in part.get("images", []):
            if "filename" in row and Path(row["filename"]).exists():
                row["filename"] = os.path.relpath(row["filename"], folder)


def _result(found: _Found, work: _Work) -> Result:
    if found.results is not None:
        return found.results
    result = work.suite.result(found.images)
    if isinstance(result, GenEvalResult) and found.folder is not None:
        write_results(result, found.folder / RESULTS)
    return result


def _described(found: _Found) -> dict[str, Any]:
    """Which target, and what decided its images; null where another tool drew them and did not say."""
    drawing = found.drawing or {}
    plain = {key: drawing.get(key) for key in ("seed", "guidance", "num_steps", "prompt_suffix", "resolution")}
    return {"target": found.name, **plain, "drawing": found.drawing}


def _as_drawn(how: DrawingSettings, drawing: dict[str, Any]) -> DrawingSettings:
    """The second target is drawn as the first: guidance, steps and suffix are only then no part of the difference."""
    return DrawingSettings(
        seed=drawing.get("seed", how.seed),
        guidance=drawing.get("guidance") if how.guidance is None else how.guidance,
        num_steps=how.num_steps or drawing.get("num_steps"),
        batch_size=how.batch_size,
        prompt_suffix=drawing.get("prompt_suffix", how.prompt_suffix),
    )


def _check_options(target: str, suite: Suite, options: Options) -> None:
    if options.against and options.compare:
        raise UserError("--against and --compare: give one; --compare is against the target's own base.")
    taken = _is_drawn(target) or _is_plain(target, suite)
    if options.compare and taken:
        raise UserError(f"--compare: {target} has no base; name what to compare with by --against.")
    if options.how.prompt_suffix and taken:
        raise UserError(f"--prompt-suffix: {target} is drawn already; leave it out.")
    if options.images is not None and taken and not options.against:
        raise UserError(f"--images {options.images}: {target} is drawn already; leave --images out.")
    if options.shard is not None and options.images is None and not taken:
        raise UserError("--shard: the shares need a folder to meet in; name it by --images.")
    if options.images is not None and options.images.exists() and not options.images.is_dir():
        raise UserError(f"--images {options.images}: there is a file of that name; give a folder.")


def _is_drawn(target: str) -> bool:
    return is_image_folder(Path(target)) or target.endswith(".jsonl")


def _is_plain(target: str, suite: Suite) -> bool:
    """A folder of pictures without prompts, which FID alone can do with; a model's folder may hold some too."""
    path = Path(target)
    return suite.name == "fid" and bool(pictures_in(path)) and not (path / "model_index.json").is_file()


@contextmanager
def _image_place(options: Options) -> Iterator[Path]:
    """The folder for drawn images; gone afterwards unless one was named."""
    if options.images is not None:
        yield options.images
        return
    with tempfile.TemporaryDirectory(prefix="agsm-rl-eval-") as folder:
        yield Path(folder)

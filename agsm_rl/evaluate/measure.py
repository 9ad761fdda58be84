"""Draws a suite's prompts and judges the pictures as they come: the one way in which anything drawn is measured.

Whole batches are shared over the processes, so that each image is drawn in the same company, and is the same to the
bit, for any number of them. The rows are exchanged at the end: every process has the whole measurement. While a GPU
draws a batch, a thread judges the one before; on a CPU both would compete for the same cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from agsm_rl.backbones.text_cache import up_to_drawing
from agsm_rl.evaluate.draw_folder import DrawingSettings, draw_batch, draw_pictures, plan
from agsm_rl.evaluate.drawing import to_picture
from agsm_rl.evaluate.suite import Asked, Judged, Row, Suite
from agsm_rl.interfaces import Backbone
from agsm_rl.training.in_flight import InFlight
from agsm_rl.training.processes import Processes
from agsm_rl.training.stages import stage

SHOWN = 16
"""Images of a model that are kept for pictures: those of the suite's first prompts, not chosen ones."""


@dataclass(frozen=True)
class Drawing:
    """What was drawn and judged.

    Attributes:
        judged: Each suite's rows, in the order of the prompts' numbers, then of the images'.
        pictures: The first pictures that were planned, by the numbers of the prompt and of the image.
    """

    judged: list[list[Judged]]
    pictures: dict[tuple[int, int], Image]


def draw_and_judge(
    backbone: Backbone,
    suites: Sequence[Suite],
    how: DrawingSettings,
    *,
    asked: Sequence[Asked] | None = None,
    processes: Processes | None = None,
    check: Callable[[], None] = lambda: None,
    advance: Callable[[int], None] = lambda number: None,
) -> Drawing:
    """Draw the first suite's images with the backbone as it is, adapters on or off, and have all suites judge them.

    Args:
        backbone: What draws.
        suites: The suite whose prompts are drawn, and further ones that judge the same pictures.
        how: `guidance` and `num_steps` must be given.
        asked: What to draw instead of the suite's own plan.
        processes: Those that share the work. All of them must call this. None: this one alone.
        check: Called before each batch; what it raises on one process, all raise after the exchange.
        advance: Called after each batch with the number of its images, on this process.
    """
    asked = plan(suites[0].prompts(), suites[0].num_images) if asked is None else asked
    rows: dict[int, tuple[Row, ...]] = {}
    pictures: dict[int, Image] = {}
    stop: Exception | None = None
    waiting: deque[tuple[range, Future[Seen]]] = deque()

    def collect(most: int) -> None:
        """Take what was judged, until `most` batches are left."""
        while len(waiting) > most:
            batch, seen = waiting[0][0], waiting.popleft()[1].result()
            rows.update(zip(batch, seen.rows, strict=True))
            pictures.update((place, seen.pictures[n]) for n, place in enumerate(batch) if place < SHOWN)
            advance(len(batch))

    beside = backbone.device.type != "cpu"
    with _judging(backbone.device) if beside else nullcontext(_done) as submit:
        for batch in _batches(len(asked), how.batch_size, processes):
            try:
                check()
            except Exception as error:  # noqa: BLE001 - whatever ends the evaluation here ends it on all processes
                stop = error
                break
            part = [asked[place] for place in batch]
            images = draw_batch(suites[0], backbone, part, how)
            waiting.append((batch, submit(partial(_see, suites, part, images, shown=not beside))))
            collect(1 if beside else 0)
        else:
            collect(0)
    shares = [(stop, rows, pictures)]
    if processes is not None and processes.count > 1:
        shares = processes.gather_objects(shares)
    for stopped, other_rows, other_pictures in shares:
        if stopped is not None:
            raise stopped
        rows |= other_rows
        pictures |= other_pictures
    order = sorted(range(len(asked)), key=lambda place: (asked[place].prompt_index, asked[place].number))
    judged = [[_judged(asked[place], rows[place][k]) for place in order] for k in range(len(suites))]
    return Drawing(judged, {(asked[place].prompt_index, asked[place].number): pictures[place] for place in pictures})


def encode_prompts(
    backbone: Backbone, suite: Suite, how: DrawingSettings, *, processes: Processes | None = None
) -> None:
    """Encode the prompts of this process's share of a suite, and draw nothing; for backbones with a text cache."""
    asked = plan(suite.prompts(), suite.num_images)
    for batch in _batches(len(asked), how.batch_size, processes):
        with up_to_drawing(backbone):
            draw_pictures(suite, backbone, [asked[place] for place in batch], how)


def _batches(count: int, size: int, processes: Processes | None) -> list[range]:
    """The places of this process's batches."""
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return batches if processes is None else batches[processes.index :: processes.count]


def _judged(asked: Asked, row: Row) -> Judged:
    return Judged(asked.prompt_index, asked.number, asked.metadata, row)


@dataclass(frozen=True)
class Seen:
    """A batch as it was judged: the pictures, and each one's rows, one of each suite."""

    pictures: list[Image]
    rows: list[tuple[Row, ...]]


Submit = Callable[[Callable[[], Seen]], "Future[Seen]"]


@contextmanager
def _judging(device: torch.device) -> Iterator[Submit]:
    """What judges batches in a thread beside the one that draws."""
    grad = torch.is_grad_enabled()  # this and the device are each thread's own

    def as_here(call: Callable[[], Seen]) -> Seen:
        with torch.set_grad_enabled(grad), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return call()

    with InFlight("judge") as thread:
        yield lambda call: thread.submit(partial(as_here, call))


def _done(call: Callable[[], Seen]) -> Future[Seen]:
    future: Future[Seen] = Future()
    future.set_result(call())
    return future


def _see(suites: Sequence[Suite], asked: Sequence[Asked], images: Tensor, *, shown: bool) -> Seen:
    """Judge a batch of images [B, 3, H, W] as a user would save them; `shown` as a stage, in the main thread only."""
    pictures = [to_picture(image) for image in images]
    prompts: list[str] = [item.prompt for item in asked]
    metadata: list[Mapping[str, Any]] = [item.metadata for item in asked]
    judged = []
    for suite in suites:
        what = f"judging {len(pictures)} images by {suite.name}"
        with stage(what, worth=len(pictures)) if shown else nullcontext():
            judged.append(suite.judge(pictures, prompts, metadata))
    return Seen(pictures, list(zip(*judged, strict=True)))

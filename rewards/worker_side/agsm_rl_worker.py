"""A reward in a separate process: the frames that go over pipes, HTTP and Ray, and `serve`, which answers them.

Needs nothing but Python 3.10, so it runs in any environment; the client puts this file's folder on the path.
A reward's script ends with `serve(MyReward)`:

    from agsm_rl_worker import serve

    class MyReward:
        images = "pil"                      # or "numpy": float32 [B, 3, H, W] in [0, 1]
        range = (0.0, 1.0)                  # optional

        def __init__(self, *, threshold=0.5): ...         # the recipe's `options`
        def __call__(self, images, prompts): ...          # → one score per image
        # or (self, images, prompts, metadata): one dict per image, the other columns of the file of prompts

    serve(MyReward)

A frame: magic, header size (4 bytes) and body size (8 bytes), big-endian; a JSON header; raw little-endian arrays, one
after another, whose names, types and shapes are in the header. Nothing is ever pickled.
"""

from __future__ import annotations

import array
import inspect
import json
import math
import os
import queue
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

PROTOCOL = 1
MAGIC = b"AGRW"
PREFIX = struct.Struct(">4sIQ")
MAX_HEADER = 16 * 2**20
MAX_BODY = 2**30
ITEM_BYTES = {"float32": 4, "uint8": 1}
MAX_DIMENSIONS = 4
GRACE = 5.0
"""Seconds that a worker may go on after its client is gone."""

Buffer = bytes | bytearray | memoryview


class ProtocolError(Exception):
    """Bytes that are not a frame of this protocol."""


class Refused(Exception):
    """Raised by a reward for what trying again cannot fix: a wrong option, a missing file. It stops the client."""


class Array(NamedTuple):
    """Raw numbers: `dtype` is a key of ITEM_BYTES, `data` holds them in C order, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Buffer


class Frame(NamedTuple):
    """A header with an `op`, and arrays by name."""

    header: dict[str, Any]
    arrays: dict[str, Array]


def encode(header: dict[str, Any], arrays: Iterable[Array] = ()) -> list[Buffer]:
    """A frame as buffers to write one after another; large arrays are not copied."""
    arrays = list(arrays)
    described = [{"name": item.name, "dtype": item.dtype, "shape": list(item.shape)} for item in arrays]
    text = json.dumps({**header, "arrays": described}, allow_nan=False).encode()
    bodies = [memoryview(item.data).cast("B") for item in arrays]
    size = sum(len(body) for body in bodies)
    return [PREFIX.pack(MAGIC, len(text), size) + text, *bodies]


def read_frame(read: Callable[[int], Buffer], *, max_body: int = MAX_BODY, start: bytes = b"") -> Frame:
    """The next frame; `read(n)` returns exactly n bytes or raises. ProtocolError before anything large is read.

    start: bytes of the frame that have been read already.
    """
    magic, header_size, body_size = PREFIX.unpack(start + bytes(read(PREFIX.size - len(start))))
    if magic != MAGIC:
        raise ProtocolError(f"a frame begins with {MAGIC!r}; got {magic!r}")
    if header_size > MAX_HEADER:
        raise ProtocolError(f"its header of {header_size} bytes is over the limit of {MAX_HEADER}")
    if body_size > max_body:
        raise ProtocolError(f"its body of {body_size} bytes is over the limit of {max_body}")
    header, described = _header(bytes(read(header_size)))
    sizes = [ITEM_BYTES[dtype] * math.prod(shape) for _, dtype, shape in described]
    if sum(sizes) != body_size:
        raise ProtocolError(f"its arrays need {sum(sizes)} bytes, but its body has {body_size}")
    arrays = {}
    for (name, dtype, shape), size in zip(described, sizes, strict=True):
        arrays[name] = Array(name, dtype, shape, read(size))
    return Frame(header, arrays)


def decode(data: Buffer, *, max_body: int = MAX_BODY) -> Frame:
    """`data` as one frame; ProtocolError for anything missing or left over."""
    view, place = memoryview(data), 0

    def read(count: int) -> memoryview:
        nonlocal place
        part = view[place : place + count]
        if len(part) < count:
            raise ProtocolError(f"truncated: {len(part)} bytes where {count} are needed")
        place += count
        return part

    frame = read_frame(read, max_body=max_body)
    if place != len(view):
        raise ProtocolError(f"{len(view) - place} bytes follow the frame")
    return frame


def _header(text: bytes) -> tuple[dict[str, Any], list[tuple[str, str, tuple[int, ...]]]]:
    """The JSON header, and the arrays it describes, every value checked."""
    try:
        header = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("op"), str):
        raise ProtocolError("its header is not a mapping with an 'op'")
    listed = header.pop("arrays", [])
    if not isinstance(listed, list):
        raise ProtocolError("its 'arrays' are not a list")
    arrays: list[tuple[str, str, tuple[int, ...]]] = []
    for item in listed:
        name, dtype, shape = _described(item)
        if name in {known for known, _, _ in arrays}:
            raise ProtocolError(f"the array '{name}' is listed twice")
        arrays.append((name, dtype, shape))
    return header, arrays


def _described(item: Any) -> tuple[str, str, tuple[int, ...]]:
    name, dtype, shape = (item.get(key) for key in ("name", "dtype", "shape")) if isinstance(item, dict) else [None] * 3
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ProtocolError(f"an array has a name and a dtype of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"a shape is a list of at most {MAX_DIMENSIONS} sizes")
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ProtocolError("a shape's sizes are whole numbers from 0")
    return name, dtype, tuple(shape)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


DECLARED: dict[str, Any] = {"images": "numpy", "range": (-math.inf, math.inf), "packages": ()}
"""What a reward may declare as attributes, and what holds where it does not."""


def _declared(reward: Any, name: str) -> Any:
    return getattr(reward, name, DECLARED[name])


class Endpoint:
    """A reward behind frames: the same answers over a pipe, HTTP or Ray. `make(**options)` returns the reward.

    It is made at the first greeting. After `MemoryError` or torch's OutOfMemoryError the process cannot be trusted:
    `spent` is set, and it should end, to be started again.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.reward: Any = None
        self.spent = False

    def answer(self, frame: Frame) -> list[Buffer]:
        """The answer to a frame; an exception, sys.exit() too, becomes an answer that reports it."""
        op, number = frame.header["op"], frame.header.get("id")
        try:
            if op == "hello":
                return encode(self._hello(frame.header))
            if op == "score":
                return encode({"op": "scores", "id": number}, [self._score(frame)])
            raise ProtocolError(f"'{op}' is not an op; allowed: hello, score")
        except (ProtocolError, Refused) as error:
            return encode({"op": "refused", "id": number, "message": str(error)})
        except (Exception, SystemExit) as error:
            traceback.print_exc(file=sys.stderr)
            self.spent = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            said = " ".join(f"{type(error).__name__}: {error}".split())
            return encode({"op": "error", "id": number, "message": said[:2000], "spent": self.spent})

    def _hello(self, header: dict[str, Any]) -> dict[str, Any]:
        spoken, options = header.get("protocol"), header.get("options", {})
        if not isinstance(spoken, list) or PROTOCOL not in spoken:
            raise Refused(f"the worker speaks version {PROTOCOL} of the protocol, the client {spoken}")
        if self.reward is None:
            if not isinstance(options, dict):
                raise ProtocolError("'options' are not a mapping")
            self.reward = self.make(**options)
        elif options:
            raise Refused("this reward is running already, with its own options; leave them out")
        low, high = _declared(self.reward, "range")
        return {
            "op": "hello",
            "protocol": PROTOCOL,
            "metadata": _takes_metadata(self.reward),
            "images": "uint8" if _declared(self.reward, "images") == "pil" else "float32",
            "range": [low if math.isfinite(low) else None, high if math.isfinite(high) else None],
            "packages": {name: _version(name) for name in _declared(self.reward, "packages")},
        }

    def _score(self, frame: Frame) -> Array:
        if self.reward is None:
            raise ProtocolError("'hello' must come before 'score'")
        images, prompts = frame.arrays.get("images"), frame.header.get("prompts")
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ProtocolError("'prompts' are not a list of texts")
        if images is None or len(images.shape) != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ProtocolError("'images' are not of shape [B, 3, H, W]")
        if len(prompts) != images.shape[0]:
            raise ProtocolError(f"there are {images.shape[0]} images, but {len(prompts)} prompts")
        arguments = [_as_declared(images, _declared(self.reward, "images")), prompts]
        if _takes_metadata(self.reward):
            arguments.append(_metadata(frame.header.get("metadata"), len(prompts)))
        scores = _flat(self.reward(*arguments), len(prompts))
        return Array("scores", "float32", (len(scores),), _little_endian(array.array("f", scores)))


def _takes_metadata(reward: Any) -> bool:
    """Whether it is called with metadata: if it says so by `takes_metadata`, else if it has such a parameter."""
    declared = getattr(reward, "takes_metadata", None)
    if declared is not None:
        return bool(declared)
    try:
        return "metadata" in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False


def _metadata(rows: Any, count: int) -> list[dict[str, Any]]:
    """One mapping per image; empty ones where the client has none."""
    if rows is None:
        return [{} for _ in range(count)]
    if not isinstance(rows, list) or len(rows) != count or not all(isinstance(row, dict) for row in rows):
        raise ProtocolError(f"'metadata' is not a list of {count} mappings, one per image")
    return rows


def serve(make: Callable[..., Any]) -> None:
    """Answer frames on stdin and stdout until stdin ends. Whatever is printed meanwhile goes to stderr."""
    source, sink = _take_pipes()
    frames: queue.Queue[Frame | None] = queue.Queue()
    threading.Thread(target=_read_all, args=(source, frames), daemon=True).start()
    endpoint = Endpoint(make)
    while (frame := frames.get()) is not None:
        for part in endpoint.answer(frame):
            _write_all(sink, part)
        if endpoint.spent:
            os._exit(3)


def _take_pipes() -> tuple[int, int]:
    """Private copies of stdin and stdout; 0 becomes empty and 1 goes to stderr, for C code and children too."""
    source, sink = os.dup(0), os.dup(1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return source, sink


def _read_all(source: int, frames: queue.Queue[Frame | None]) -> None:
    """Feed the queue. When the client is gone, end the process, even if it hangs in the reward."""
    with os.fdopen(source, "rb") as file:

        def read(count: int) -> bytes:
            data = file.read(count)
            if len(data) < count:
                raise ProtocolError("the client is gone")
            return data

        try:
            while True:
                frames.put(read_frame(read))
        except ProtocolError as error:
            if str(error) != "the client is gone":
                print(f"agsm_rl_worker: {error}", file=sys.stderr)
        frames.put(None)
    time.sleep(GRACE)
    os._exit(1)


def _write_all(sink: int, data: Buffer) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(sink, view) :]


def _as_declared(images: Array, kind: str) -> Any:
    import numpy

    pixels = numpy.frombuffer(images.data, dtype="<f4" if images.dtype == "float32" else "u1").reshape(images.shape)
    if kind == "pil":
        from PIL import Image

        if pixels.dtype != numpy.uint8:
            pixels = (pixels.clip(0, 1) * 255).round().astype("u1")
        return [Image.fromarray(picture) for picture in numpy.ascontiguousarray(pixels.transpose(0, 2, 3, 1))]
    pixels = pixels.astype("f4")  # a copy too: the buffer cannot be written to
    return pixels if images.dtype == "float32" else pixels / 255


def _flat(scores: Any, count: int) -> list[float]:
    """The reward's answer as `count` numbers; ValueError if it is anything else."""
    listed = scores.tolist() if hasattr(scores, "tolist") else scores  # a tensor or an array, of whatever package
    if not isinstance(listed, (list, tuple)) or len(listed) != count:
        shape = tuple(scores.shape) if hasattr(scores, "shape") else type(scores).__name__
        raise ValueError(f"the reward returned {shape}, but one score per image is needed: {count} numbers")
    flat = [item.item() if hasattr(item, "item") else item for item in listed]
    bad = [item for item in flat if isinstance(item, bool) or not isinstance(item, (int, float))]
    if bad:
        raise ValueError(f"the reward returned {bad[0]!r} as a score, but it must be a number")
    return [float(item) for item in flat]


def _little_endian(numbers: array.array) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _version(package: str) -> str:
    from importlib import metadata  # slow to import, and rarely needed

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"

"""A worker that fails as it is told: the prompt `fault:number` names what goes wrong, once (`fault:number:always`).

Scores are the images' first pixels. Needs nothing but agsm_rl_worker.py; `marks` is a folder to remember in.
"""

import os
import signal
import struct
import subprocess
import sys
import time
from array import array
from pathlib import Path

import agsm_rl_worker as protocol


class FirstPixel:
    range = (-1.0, 100.0)

    def __init__(self, *, refuse: str = "", sleep: float = 0.0) -> None:
        if refuse:
            raise protocol.Refused(refuse)
        time.sleep(sleep)


def scores_of(frame):
    """The right scores, read from the raw bytes."""
    images = frame.arrays["images"]
    size = len(images.data) // images.shape[0]
    firsts = [struct.unpack_from("<f", images.data, row * size)[0] for row in range(images.shape[0])]
    return array("f", firsts)


def answered(frame, scores, *, number=None, shape=None, dtype="float32"):
    number = frame.header["id"] if number is None else number
    found = protocol.Array("scores", dtype, shape or (len(scores),), scores.tobytes())
    return b"".join(protocol.encode({"op": "scores", "id": number}, [found]))


def noise():
    print("a banner", flush=True)
    os.write(1, b"bytes \xff\x00 of C code\n" + protocol.MAGIC)
    subprocess.run(["echo", "a child's print"], check=True)


def tampered(fault, frame, sink):
    """What is sent in place of the right answer."""
    right = answered(frame, scores_of(frame))
    many = len(scores_of(frame))
    if fault == "crash":
        os._exit(7)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(3600)
    if fault == "late":
        time.sleep(2.0)
    if fault == "noise":
        noise()
    if fault == "half":
        os.write(sink, right[: len(right) // 2])
        os._exit(0)
    if fault == "half_hang":
        os.write(sink, right[: len(right) // 2])
        time.sleep(3600)
    if fault == "quiet_end":
        os.close(sink)
        time.sleep(3600)
    return {
        "garbage": os.urandom(200),
        "oversized": protocol.PREFIX.pack(protocol.MAGIC, 20, 2**60),
        "oversized_header": protocol.PREFIX.pack(protocol.MAGIC, 2**32 - 1, 0),
        "no_json": protocol.PREFIX.pack(protocol.MAGIC, 5, 0) + b"{]}\x00\xff",
        "deep_json": protocol.PREFIX.pack(protocol.MAGIC, 200_000, 0) + b"[" * 200_000,
        "other_op": b"".join(protocol.encode({"op": "hello"})),
        "old_answer": answered(frame, scores_of(frame), number=frame.header["id"] - 1),
        "wrong_length": answered(frame, scores_of(frame) + array("f", [1.0])),
        "wrong_shape": answered(frame, scores_of(frame), shape=(many, 1)),
        "wrong_type": answered(frame, array("B", bytes(many)), dtype="uint8"),
        "nan": answered(frame, array("f", [float("nan")] * many)),
        "infinite": answered(frame, array("f", [float("inf")] * many)),
        "out_of_range": answered(frame, array("f", [1e6] * many)),
        "no_scores": b"".join(protocol.encode({"op": "scores", "id": frame.header["id"]})),
        "error": b"".join(protocol.encode({"op": "error", "message": "ValueError: no luck"})),
    }.get(fault, right)


def main(marks: Path) -> None:
    noise() if (marks / "noise_first").exists() else None
    source, sink = protocol._take_pipes()
    frames = protocol.queue.Queue()
    protocol.threading.Thread(target=protocol._read_all, args=(source, frames), daemon=True).start()
    endpoint = protocol.Endpoint(FirstPixel)
    while (frame := frames.get()) is not None:
        if frame.header["op"] == "hello":
            parts = b"".join(endpoint.answer(frame))
        else:
            fault, _, number = frame.header["prompts"][0].partition(":")
            mark = marks / number
            again = mark.exists() and not number.endswith("always")
            mark.touch()
            parts = answered(frame, scores_of(frame)) if again else tampered(fault, frame, sink)
        protocol._write_all(sink, parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

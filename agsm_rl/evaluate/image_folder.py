"""Images on disk in GenEval's layout, drawn by any tool, with the measurements of each stored beside it.

<folder>/00000/metadata.jsonl        {"prompt": …, and other keys that the suite needs}
<folder>/00000/samples/0000.png      the images of that prompt
<folder>/00000/<kind>/0000.png.json  a measurement (detections, a reward's score, …) of that image
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.files import check_regular, read_json, write_text
from agsm_rl.sources.pictures import upright_rgb

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
"""Accepted whatever the file's name: Pillow would pass others, such as PostScript, to external programs."""
METADATA, SAMPLES = "metadata.jsonl", "samples"
ASKED = "asked_sha256"
"""A measurement's key for the prompt that it was made for."""


@dataclass(frozen=True)
class Drawn:
    """One image of a suite: file, prompt number, its number among that prompt's images, and the prompt's metadata."""

    path: Path
    prompt_index: int
    number: int
    metadata: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """The prompt."""
        return str(self.metadata["prompt"])


def file_name(prompt_index: int, number: int) -> str:
    """Where image `number` of a prompt lies in its folder."""
    return f"{prompt_index:05d}/{SAMPLES}/{number:04d}.png"


def is_image_folder(path: Path) -> bool:
    """True for a folder in GenEval's layout."""
    return path.is_dir() and any(_prompt_folders(path))


def read_images(folder: Path) -> list[Drawn]:
    """Every image of a folder in GenEval's layout, in order; UserError if the layout is broken.

    Pictures are not decoded until `open_picture`.
    """
    images: list[Drawn] = []
    for place in _prompt_folders(folder):
        metadata = _read_metadata(place / METADATA)
        samples = pictures_in(place / SAMPLES)
        if not samples:
            raise UserError(f"{place / SAMPLES}: contains no image; draw it again, or remove {place}.")
        images += [Drawn(path, int(place.name), number, metadata) for number, path in enumerate(samples)]
    if not images:
        raise UserError(f"{folder}: has no images in GenEval's layout (00000/{METADATA}, 00000/{SAMPLES}/0000.png).")
    return images


def pictures_in(folder: Path) -> list[Path]:
    """The image files of one folder, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != ".")


def open_picture(path: Path) -> Image.Image:
    """The whole picture in RGB, upright, on white; UserError if it is truncated or not a picture."""
    check_regular(path)
    try:
        with Image.open(path, formats=FORMATS) as opened:
            return upright_rgb(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); draw or copy it again.") from error


def is_whole(path: Path) -> bool:
    """True if the picture exists and can be decoded to the end."""
    if not path.is_file():
        return False
    try:
        open_picture(path)
    except UserError:
        return False
    return True


class Measurements:
    """Measurements of images, one JSON file each in the folder `kind` beside `samples`.

    A measurement does not count if the image has changed since, if it was made with another `how`, or if it was made
    for another prompt: its text and every other column, where the judge sees them (`asked`).

    Args:
        kind: The folder's name.
        how: What the measurement depends on besides the image (model, options).
        of_today: Translates the `how` of an earlier version; raises UserError if it no longer means anything.
        digest: An image's hash, by default that of its file now; several kinds may share one that remembers.
    """

    def __init__(
        self,
        kind: str,
        how: Mapping[str, Any],
        *,
        of_today: Callable[[Any], Mapping[str, Any]] = lambda how: how,
        digest: Callable[[Path], str] | None = None,
    ) -> None:
        self.kind, self.how, self._of_today = kind, json.loads(json.dumps(how)), of_today
        self._digest = digest or sha256

    def file(self, image: Path) -> Path:
        """Where the measurement of an image is stored."""
        return image.parents[1] / self.kind / f"{image.name}.json"

    def read(self, image: Path, asked: Mapping[str, Any] | None = None) -> Any | None:
        """The measurement; None if there is no valid one.

        Args:
            image: The image's file.
            asked: The prompt's row, as the judge sees it; None if it judges by the image alone.
        """
        try:
            content = read_json(self.file(image))
            holds = content["image_sha256"] == self._digest(image)
            holds = holds and (content["how"] == self.how or self._of_today(content["how"]) == self.how)
            holds = holds and (asked is None or self._is_of(content, image, _as_kept(asked, image)))
            return content["found"] if holds else None
        except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def write(self, image: Path, measured: Any, asked: Mapping[str, Any] | None = None) -> None:
        """Store a measurement; a kill leaves the old one, the new one or none. `asked` is as for `read`."""
        file = self.file(image)
        content = {"how": self.how, "image_sha256": self._digest(image)}
        content |= {} if asked is None else {ASKED: _digest_of(_as_kept(asked, image))}
        try:
            file.parent.mkdir(exist_ok=True)
            write_text(file, json.dumps(content | {"found": measured}) + "\n")
        except OSError as error:
            raise UserError(
                f"{file}: cannot be written ({error.strerror}). Measurements are stored beside the images, so give a "
                "writable copy of the folder."
            ) from error

    def _is_of(self, content: Mapping[str, Any], image: Path, asked: Mapping[str, Any]) -> bool:
        """Whether a measurement was made for this prompt.

        Earlier versions did not store what they were asked. Theirs count if they name this prompt themselves, as
        verdicts do; or else as long as the prompt beside the image is this one, and was not written after them.
        """
        if ASKED in content:
            return bool(content[ASKED] == _digest_of(asked))
        if isinstance(content["found"], dict) and "prompt" in content["found"]:
            return bool(content["found"]["prompt"] == asked["prompt"])
        prompt = image.parents[1] / METADATA
        written, measured = prompt.stat().st_mtime_ns, self.file(image).stat().st_mtime_ns
        return written <= measured and _digest_of(_read_metadata(prompt)) == _digest_of(asked)


def _as_kept(asked: Mapping[str, Any], image: Path) -> Mapping[str, Any]:
    """The columns of a prompt's row that metadata.jsonl beside its images has: earlier versions kept fewer there."""
    file = image.parents[1] / METADATA
    if not file.is_file():
        return asked
    kept = _read_metadata(file)
    return {name: value for name, value in asked.items() if name in kept}


def _digest_of(asked: Mapping[str, Any]) -> str:
    """The hash of a prompt's row, the same before it is written to metadata.jsonl and after it is read from there."""
    plain = json.dumps(json.loads(json.dumps(asked)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def sha256(path: Path) -> str:
    """The file's hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_metadata(place: Path, metadata: Mapping[str, Any]) -> None:
    """Write a prompt's metadata.jsonl; UserError if there is one of another prompt."""
    file = place / METADATA
    if file.is_file():
        there, now = _read_metadata(file), json.loads(json.dumps(metadata))
        if any(now.get(key) != value for key, value in there.items()):  # earlier versions kept fewer columns
            raise UserError(
                f"{file}: belongs to another prompt ('{there['prompt']}', not '{metadata['prompt']}'), so the folder "
                "was drawn for other prompts; give another --images."
            )
        return
    (place / SAMPLES).mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(metadata, ensure_ascii=False) + "\n")


def _prompt_folders(folder: Path) -> Sequence[Path]:
    """The prompts' folders, in the order of their numbers."""
    places = [place for place in folder.iterdir() if place.name.isdecimal() and (place / METADATA).is_file()]
    return sorted(places, key=lambda place: int(place.name))


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"{error} It must be one JSON object.") from error
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise UserError(f'{file}: has no prompt; it must be one JSON object with "prompt".')
    return content

"""Images on disk in GenEval's layout, whoever drew them, and what was measured on each, stored beside it.

<folder>/00000/metadata.jsonl        {"prompt": …, and what else the suite asks for}
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
"""Whatever a file's name says: Pillow would hand others, such as PostScript, to other programs."""
METADATA, SAMPLES = "metadata.jsonl", "samples"


@dataclass(frozen=True)
class Drawn:
    """One image of a suite: its file, the number of its prompt, which of that prompt's images it is, its metadata."""

    path: Path
    prompt_index: int
    number: int
    metadata: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """What was asked for."""
        return str(self.metadata["prompt"])


def is_image_folder(path: Path) -> bool:
    """True for a folder in GenEval's layout."""
    return path.is_dir() and any(_prompt_folders(path))


def read_images(folder: Path) -> list[Drawn]:
    """Every image of a folder in GenEval's layout, in order; UserError where the layout is broken.

    Whether each picture can be decoded is found out when it is opened (`open_picture`).
    """
    found: list[Drawn] = []
    for place in _prompt_folders(folder):
        metadata = _read_metadata(place / METADATA)
        samples = pictures_in(place / SAMPLES)
        if not samples:
            raise UserError(f"{place / SAMPLES}: there is no image in it; draw it again, or remove {place}.")
        found += [Drawn(path, int(place.name), number, metadata) for number, path in enumerate(samples)]
    if not found:
        raise UserError(f"{folder}: it has no images in GenEval's layout (00000/{METADATA}, 00000/{SAMPLES}/0000.png).")
    return found


def pictures_in(folder: Path) -> list[Path]:
    """The image files of one folder, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != ".")


def open_picture(path: Path) -> Image.Image:
    """The whole picture in RGB, upright, on white; UserError if it is torn or no picture."""
    check_regular(path)
    try:
        with Image.open(path, formats=FORMATS) as opened:
            return upright_rgb(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: it cannot be read as a picture ({error}); draw or copy it again.") from error


def is_whole(path: Path) -> bool:
    """True for a picture that is there and can be decoded to its end."""
    if not path.is_file():
        return False
    try:
        open_picture(path)
    except UserError:
        return False
    return True


class Measurements:
    """What was measured on images, a JSON file each in the folder `kind` beside `samples`.

    how: what the measurement depends on besides the image (model, options). A measurement of another image under the
    same name, or made otherwise, does not count as there. of_today: makes of an earlier version's `how` what it means
    in this one (UserError: nothing any more).
    """

    def __init__(
        self, kind: str, how: Mapping[str, Any], *, of_today: Callable[[Any], Mapping[str, Any]] = lambda how: how
    ) -> None:
        self.kind, self.how, self._of_today = kind, json.loads(json.dumps(how)), of_today

    def file(self, image: Path) -> Path:
        """Where the measurement of an image is kept."""
        return image.parents[1] / self.kind / f"{image.name}.json"

    def read(self, image: Path) -> Any | None:
        """The measurement; None if there is none that holds."""
        try:
            content = read_json(self.file(image))
            holds = content["image_sha256"] == sha256(image)
            holds = holds and (content["how"] == self.how or self._of_today(content["how"]) == self.how)
            return content["found"] if holds else None
        except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def write(self, image: Path, found: Any) -> None:
        """Keep a measurement; a kill leaves the old one, the new one or none."""
        file = self.file(image)
        try:
            file.parent.mkdir(exist_ok=True)
            write_text(file, json.dumps({"how": self.how, "image_sha256": sha256(image), "found": found}) + "\n")
        except OSError as error:
            raise UserError(
                f"{file}: cannot be written ({error.strerror}); what is measured is kept beside the images, so give a "
                "folder that can be written (a copy)."
            ) from error


def sha256(path: Path) -> str:
    """The file's hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_metadata(place: Path, metadata: Mapping[str, Any]) -> None:
    """Write a prompt's metadata.jsonl; UserError if another prompt's is there already."""
    file = place / METADATA
    if file.is_file():
        there = _read_metadata(file)
        if there != json.loads(json.dumps(metadata)):
            raise UserError(
                f"{file}: it is of another prompt ('{there['prompt']}', not '{metadata['prompt']}'); the folder was "
                "drawn for other prompts, give another --images."
            )
        return
    (place / SAMPLES).mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(metadata, ensure_ascii=False) + "\n")


def _prompt_folders(folder: Path) -> Sequence[Path]:
    """In the order of their numbers."""
    places = [place for place in folder.iterdir() if place.name.isdigit() and (place / METADATA).is_file()]
    return sorted(places, key=lambda place: int(place.name))


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"{error} It should be one JSON object.") from error
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise UserError(f'{file}: it has no prompt; it should be one JSON object with "prompt".')
    return content

"""COCO's captions and images in the form that the recipes and the measurements take.

Makes of COCO's own folders (train2017, val2017, annotations):
- coco_train2017/: links to the training images, and metadata.jsonl with all captions of each;
- coco_val/: the validation images, resized by the short side and cropped in the centre, for FID;
- coco_val_captions.txt: the first caption of each validation image, in the order of their numbers, as the authors'
  loaders read them.
"""

from __future__ import annotations

import json
from pathlib import Path

from agsm_rl.errors import UserError

VAL_SIDE = 512


def prepare(coco: Path, data: Path, *, side: int = VAL_SIDE) -> None:
    """Write all three; what is there is kept. UserError where COCO's folders are incomplete."""
    train, val = (_captions(coco, split) for split in ("train2017", "val2017"))
    folder = data / "coco_train2017"
    folder.mkdir(parents=True, exist_ok=True)
    for name in train:
        link = folder / name
        if not link.exists():
            link.symlink_to((coco / "train2017" / name).resolve())
    rows = ({"file_name": name, "caption": captions} for name, captions in train.items())
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    firsts = [captions[0] for captions in val.values()]
    (data / "coco_val_captions.txt").write_text("".join(f"{text}\n" for text in firsts), encoding="utf-8")
    (data / "coco_val").mkdir(exist_ok=True)
    for name in val:
        _crop(coco / "val2017" / name, data / "coco_val" / f"{Path(name).stem}.png", side)


def _captions(coco: Path, split: str) -> dict[str, list[str]]:
    """Captions by file name, in the order of the images' numbers; each without line breaks and outer blanks."""
    file = coco / "annotations" / f"captions_{split}.json"
    if not file.is_file() or not (coco / split).is_dir():
        raise UserError(
            f"{coco}: needs COCO's folder {split}/ and annotations/captions_{split}.json, from "
            "https://cocodataset.org/#download."
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    by_image: dict[int, list[str]] = {image["id"]: [] for image in sorted(content["images"], key=lambda row: row["id"])}
    for note in content["annotations"]:
        by_image[note["image_id"]].append(" ".join(note["caption"].split()))
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return {names[number]: captions for number, captions in by_image.items() if captions}


def _crop(source: Path, out: Path, side: int) -> None:
    from PIL import Image, ImageOps

    if not out.exists():
        with Image.open(source) as image:
            ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC).save(out)

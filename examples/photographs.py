"""Write eight captioned photographs as an image folder: `python examples/photographs.py DIR`.

scikit-image ships the photographs. recipes/imagefolder.yaml trains from such a folder: pictures beside a metadata.jsonl
with file_name and caption.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from skimage import data

CAPTIONS = {
    "astronaut": "a portrait of a smiling astronaut in an orange suit",
    "chelsea": "a close-up photo of a ginger cat looking to the side",
    "coffee": "a cup of coffee on a saucer with a spoon",
    "rocket": "a rocket on its launch pad at night under floodlights",
    "hubble_deep_field": "many distant galaxies on a black sky",
    "retina": "a photo of the back of a human eye with its blood vessels",
    "coins": "rows of old coins on a dark cloth, in grey",
    "camera": "a man behind a camera on a tripod, in black and white",
}


def main(out: Path) -> None:
    """Write the pictures and their metadata.jsonl into a new folder."""
    out.mkdir(parents=True)
    rows = []
    for name, caption in CAPTIONS.items():
        Image.fromarray(getattr(data, name)()).save(out / f"{name}.png")
        rows.append(json.dumps({"file_name": f"{name}.png", "caption": caption}))
    (out / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} captioned photographs in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

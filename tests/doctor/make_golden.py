"""Draw the doctor's golden images and store what the shipped rewards say of them: python tests/doctor/make_golden.py

Run it again only when a reward is meant to score otherwise; the images that are there stay as they are.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from agsm_rl.doctor.rewards import GOLDEN, golden_images
from agsm_rl.registry import BUILTIN, load
from agsm_rl.shapes import world

# Relative tolerances: JPEG's size may change with Pillow's library, the others are arithmetic.
REWARDS = [
    *(("shapes", {"verdict": verdict}, 1e-6) for verdict in ("strict", "lenient", "graded")),
    ("jpeg_compressibility", {}, 0.02),
    ("jpeg_incompressibility", {}, 0.02),
    ("brightness", {}, 1e-4),
    ("sharpness", {}, 1e-4),
]


def draw_images(folder: Path) -> list[dict[str, str]]:
    """A right drawing a tag; a wrong colour, an extra object, an empty picture and noise."""
    rows = []
    for index, tag in enumerate(world.TAGS):
        rng = np.random.default_rng(index)
        requirement = world.draw_requirement(rng, "train", tag)
        world.render(world.draw_scene(rng, requirement)).save(folder / f"{tag}.png")
        rows.append({"file": f"{tag}.png", "prompt": world.describe(requirement, rng)})
    rng = np.random.default_rng(100)
    blue = world.draw_scene(rng, world.Requirement("colors", (world.Group(1, world.SHAPES[0], "blue"),)))
    three = world.draw_scene(rng, world.Requirement("counting", (world.Group(3, world.SHAPES[1], "red"),)))
    shape, other = world.SHAPES[:2]
    wrong = {
        "wrong_color": (world.render(blue), f"a red {shape}"),
        "one_too_many": (world.render(three), f"two red {other}s"),
        "empty": (Image.new("RGB", (32, 32), world.BACKGROUND), f"a red {shape}"),
        "noise": (Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), f"two red {other}s"),
    }
    for name, (picture, prompt) in wrong.items():
        picture.save(folder / f"{name}.png")
        rows.append({"file": f"{name}.png", "prompt": prompt})
    return rows


def main() -> None:
    """Write golden.json, and the images where there are none yet."""
    file = GOLDEN / "golden.json"
    content = json.loads(file.read_text()) if file.exists() else {"images": draw_images(GOLDEN)}
    file.write_text(json.dumps(content | {"rewards": []}))
    images, prompts = golden_images()
    content["rewards"] = [
        {
            "target": BUILTIN["rewards"][name],
            "options": options,
            "tolerance": tolerance,
            "scores": load("rewards", name, where=name)(**options)(images, prompts).tolist(),
        }
        for name, options, tolerance in REWARDS
    ]
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

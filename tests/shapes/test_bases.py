"""The bases that are shipped: ordinary pipeline folders, small, with a card, able to draw what they are asked for."""

import diffusers
import pytest

from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.loading import BUILTINS
from agsm_rl.evaluate.drawing import draw
from agsm_rl.shapes.worlds import SCENES, WORLDS

BASES = {
    "shapes-sd15": diffusers.StableDiffusionPipeline,
    "shapes-sdxl": diffusers.StableDiffusionXLPipeline,
    "shapes-sd3": diffusers.StableDiffusion3Pipeline,
    "scenes-sd3": diffusers.StableDiffusion3Pipeline,
}
LARGEST = 25_000_000


def test_every_shipped_base_is_tested_here():
    assert {path.parent.name for path in BUILTINS.glob("*/model_index.json")} == set(BASES)


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_a_small_pipeline_folder_that_diffusers_loads_alone(name):
    files = [path for path in (BUILTINS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]
    assert not [path for path in files if path.suffix == ".json" and "_name_or_path" in path.read_text()]
    assert {"README.md", "training_log.jsonl"} <= {path.name for path in files}
    pipeline = BASES[name].from_pretrained(BUILTINS / name)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red star", num_inference_steps=1).images[0].size == (32, 32)


@pytest.mark.parametrize("name", BASES)
def test_a_base_draws_most_single_shapes_as_asked(name):
    backbone = load_backbone(f"builtin:{name}", device="cpu")
    world = WORLDS[name.partition("-")[0]]
    prompts = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square")]
    if world is SCENES:
        places = ("left", "right", "top")
        prompts = [f"a large {shape} at the {place}" for place in places for shape in ("moon", "cross")]
    images = draw(backbone, prompts, list(range(len(prompts))), guidance=3.0, num_steps=20)
    right = [world.judge(image, world.parse(prompt)).correct for image, prompt in zip(images, prompts, strict=True)]
    assert sum(right) >= 4, dict(zip(prompts, right, strict=True))

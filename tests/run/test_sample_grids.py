"""Sample grids: the base first, prompts under the images, one block per guidance, and images for the trackers."""

import json
from io import BytesIO, StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.errors import UserError
from agsm_rl.evaluate.captions import captioned_grid, stacked
from agsm_rl.evaluate.drawing import draw
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.folder import RunFolder
from agsm_rl.run.lifecycle import train
from agsm_rl.run.sample_grids import SampleGrids, _drawn_by, log_pictures

PROMPTS = ["a red star", "a very long prompt of which a narrow picture can show only the first few words " * 3]
SAMPLE = {"every": 1, "num_images": 2, "num_steps": 2, "guidance": [1.0, 3.0], "prompts": PROMPTS}


def make_recipe(checkpoint, **changes) -> Recipe:
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 8}
    content = {
        "steps": 2,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2, "banks": 2}},
        "objectives": [{"use": "agsm", "source": pairs}],
        "sample": SAMPLE,
        "track": [],
    }
    return Recipe.from_data(content | changes)


@pytest.fixture
def quiet():
    return Console(file=StringIO())


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """A run of two steps with a grid after each, tracked by TensorBoard."""
    recipe = make_recipe(tiny_checkpoint, track=["tensorboard"])
    return train(recipe, tmp_path_factory.mktemp("run") / "run", console=Console(file=StringIO()))


def test_a_grid_that_is_too_large_to_be_read_counts_as_missing(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "grid.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert _drawn_by(tmp_path / "grid.png") is None


def grid_of(run, step):
    return Image.open(run / "samples" / f"step-{step:08d}.png")


def test_the_grid_of_step_0_shows_what_the_base_draws_at_each_guidance_under_its_prompt(run, tiny_checkpoint):
    base = StableDiffusion(str(tiny_checkpoint), device="cpu")
    parts = []
    for guidance in SAMPLE["guidance"]:
        images = draw(base, PROMPTS, [0, 1], guidance=guidance, num_steps=2)
        parts.append((f"base, guidance {guidance:g}", captioned_grid(images, PROMPTS, columns=2)))
    assert np.array_equal(np.asarray(grid_of(run, 0)), np.asarray(stacked(parts)))


def test_later_grids_are_laid_out_alike_and_differ_from_the_bases(run):
    first, last = np.asarray(grid_of(run, 0)), np.asarray(grid_of(run, 2))
    assert first.shape == last.shape and not np.array_equal(first, last)


def test_a_grid_holds_its_whole_prompts_and_settings(run):
    about = json.loads(grid_of(run, 1).info["agsm-rl"])
    assert about["prompts"] == PROMPTS and about["guidance"] == [1.0, 3.0] and about["export"] == "live"


def test_tensorboard_gets_the_grids_as_images_of_each_step_and_guidance(run):
    files = [str(file) for file in (run / "logs").rglob("events.out.tfevents*")]
    read = [EventAccumulator(file, size_guidance={"images": 0}).Reload() for file in files]
    (events,) = (events for events in read if events.Tags()["images"])
    assert {"samples/guidance_1", "samples/guidance_3"} <= {tag.removesuffix("/0") for tag in events.Tags()["images"]}
    (tag,) = (tag for tag in events.Tags()["images"] if tag.startswith("samples/guidance_3"))
    logged = events.Images(tag)
    assert [event.step for event in logged] == [0, 1, 2]
    pictures = [Image.open(BytesIO(event.encoded_image_string)) for event in logged]
    sheet = np.asarray(grid_of(run, 2))
    part = np.asarray(pictures[2])
    assert np.array_equal(sheet[-part.shape[0] :, : part.shape[1]], part), "the lower block of the sheet"


def test_a_resumed_run_draws_only_what_is_missing_or_has_other_settings(run, tiny_checkpoint, quiet):
    samples = run / "samples"
    (samples / "step-00000000.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in samples.glob("step-*.png")}
    train(make_recipe(tiny_checkpoint, track=["tensorboard"]), run, resume=True, console=quiet)
    after = {path.name: path.stat().st_mtime_ns for path in samples.glob("step-*.png")}
    assert after.keys() - before.keys() == {"step-00000000.png"}
    assert {name: after[name] for name in before} == before
    other = make_recipe(tiny_checkpoint, track=["tensorboard"], sample=SAMPLE | {"guidance": 2.0})
    train(other, run, resume=True, console=quiet)
    assert json.loads(grid_of(run, 2).info["agsm-rl"])["guidance"] == [2.0]


def test_a_run_that_is_too_short_for_a_grid_draws_none_of_the_base(tiny_checkpoint, tmp_path):
    recipe = make_recipe(tiny_checkpoint, steps=1, sample=SAMPLE | {"every": 2})
    SampleGrids(RunFolder(tmp_path / "run"), recipe).begin(SimpleNamespace(step=0, steps=1))
    assert not (tmp_path / "run").exists()


TABLES = {
    "prompts.txt": "a red star\na blue circle\ntwo cats\n",
    "prompts.jsonl": '{"prompt": "a red star"}\n{"prompt": "a blue circle"}\n{"prompt": "two cats"}\n',
    "prompts.csv": "prompt,tag\na red star,x\na blue circle,y\ntwo cats,z\n",
}


@pytest.mark.parametrize("name", [*TABLES, "prompts.parquet"])
def test_prompts_come_from_a_file_in_order_and_are_repeated_if_there_are_too_few(name, tiny_checkpoint, tmp_path):
    file = tmp_path / name
    if name in TABLES:
        file.write_text(TABLES[name])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a red star", "a blue circle", "two cats"]}), file)
    for count, last in ((2, "a blue circle"), (4, "a red star")):
        recipe = make_recipe(tiny_checkpoint, sample={"prompts": str(file), "num_images": count})
        prompts = SampleGrids(RunFolder(tmp_path / "run"), recipe).prompts
        assert len(prompts) == count and prompts[:2] == ["a red star", "a blue circle"] and prompts[-1] == last
        assert Recipe.from_data(recipe.to_data()) == recipe


def test_another_column_of_the_file_may_hold_the_prompts(tiny_checkpoint, tmp_path):
    (tmp_path / "mine.csv").write_text("id,wanted\n1,a red star\n")
    sample = {"prompts": str(tmp_path / "mine.csv"), "prompt_column": "wanted", "num_images": 1}
    grids = SampleGrids(RunFolder(tmp_path / "run"), make_recipe(tiny_checkpoint, sample=sample))
    assert grids.prompts == ["a red star"]


def test_a_file_that_is_not_there_is_refused_with_the_recipe():
    with pytest.raises(UserError, match=r"sample\.prompts.*nowhere\.txt.*no such file"):
        make_recipe("not/loaded", sample={"prompts": "nowhere.txt"})


def test_a_file_without_prompts_is_refused_before_anything_is_loaded_or_written(tmp_path, quiet):
    (tmp_path / "mine.jsonl").write_text('{"wanted": "a red star"}\n')
    with pytest.raises(UserError, match=r"sample\.prompts.*prompt_column"):
        train(
            make_recipe("not/loaded", sample={"prompts": str(tmp_path / "mine.jsonl")}), tmp_path / "run", console=quiet
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ({"prompts": ["a"], "prompt_column": "x"}, "prompt_column is for a file"),
        ({"prompts": ""}, "sample.prompts"),
        ({"prompts": []}, "sample.prompts"),
        ({"guidance": []}, "sample.guidance"),
        ({"guidance": [1.0, "high"]}, "sample.guidance"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused_with_the_recipe(sample, told, tiny_checkpoint):
    with pytest.raises(UserError, match=told):
        make_recipe(tiny_checkpoint, sample=sample)


def test_trackers_that_take_lists_or_single_pictures_get_them_and_others_nothing():
    got = {}

    def tracker(name):
        return SimpleNamespace(name=name, log_images=lambda values, step: got.setdefault(name, (values, step)))

    picture = Image.new("RGB", (4096, 1024), "red")
    trackers = [tracker("wandb"), tracker("aim"), SimpleNamespace(name="mlflow")]
    log_pictures(SimpleNamespace(trackers=trackers), {"samples/guidance_1": picture}, 7)
    (sent,), step = got["wandb"][0]["samples/guidance_1"], got["wandb"][1]
    assert sent.size == (2048, 512) and step == 7
    assert got["aim"][0]["samples/guidance_1"].size == (2048, 512)
    assert got.keys() == {"wandb", "aim"} and picture.size == (4096, 1024)

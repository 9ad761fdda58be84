"""Images in GenEval's layout: drawn once, drawn alike by anyone, never mixed with others, and measured once."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from newer_versions import change_options
from PIL import Image
from safetensors.torch import load_file, save_file

from agsm_rl.adapters.lora import LoRA
from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate import draw_folder, suite
from agsm_rl.evaluate.draw_folder import DrawingSettings, Share, draw_images, image_of, plan, read_pinned, seed_of
from agsm_rl.evaluate.image_folder import Measurements, is_image_folder, read_images, sha256
from agsm_rl.evaluate.suites.shapes import Shapes
from agsm_rl.evaluate.target import open_target
from agsm_rl.export.attach import save_adapters
from agsm_rl.policy import Policy

ASKED = {0: {"prompt": "a red star"}, 3: {"prompt": "a blue circle"}, 5: {"prompt": "two squares"}}
WHOLE = Share()
HOW = DrawingSettings(seed=4, num_steps=2, guidance=2.0, batch_size=2)


@pytest.fixture(scope="module")
def target(tiny_checkpoint):
    return open_target(str(tiny_checkpoint), options={"device": "cpu"})


@pytest.fixture
def drawn_prompts(monkeypatch):
    """What is really drawn, in order."""
    found = []

    def spy(backbone, prompts, seeds, **how):
        found.extend(zip(prompts, seeds, strict=True))
        return real(backbone, prompts, seeds, **how)

    real = suite.draw
    monkeypatch.setattr(suite, "draw", spy)
    return found


def draw(target, folder, *, num_images=5, how=HOW, shard=WHOLE):
    return draw_asked(target, folder, ASKED, num_images, how, shard)


def draw_asked(target, folder, asked, num_images, how, shard):
    files = [image_of(folder, item) for item in plan(asked, num_images)]
    return draw_images(Shapes(), files, folder, target, how, shard)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_images_lie_in_geneval_s_layout_with_all_that_decides_them(target, tmp_path):
    draw(target, tmp_path / "im")
    names = [f"{p:05d}/samples/{k:04d}.png" for p, k in [(0, 0), (0, 1), (3, 0), (3, 1), (5, 0)]]
    assert list(contents(tmp_path / "im")) == names
    assert json.loads((tmp_path / "im/00003/metadata.jsonl").read_text()) == ASKED[3]
    pinned = read_pinned(tmp_path / "im")
    assert (pinned["seed"], pinned["guidance"], pinned["num_steps"], pinned["resolution"]) == (4, 2.0, 2, 16)
    assert pinned["scheduler"]["class"] == "DDIMScheduler" and pinned["scheduler"]["beta_end"] == 0.012
    assert {"torch", "diffusers", "agsm_rl"} <= set(pinned["versions"])
    assert [(row.prompt_index, row.number, row.prompt) for row in read_images(tmp_path / "im")][3] == (
        3,
        1,
        "a blue circle",
    )


def test_shares_together_draw_what_one_process_draws(target, tmp_path):
    draw(target, tmp_path / "whole")
    for index in range(3):
        draw(target, tmp_path / "shared", shard=Share(index, 3))
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_a_share_that_begins_while_another_does_is_not_taken_for_another_tools(target, tmp_path, monkeypatch):
    draw(target, tmp_path, shard=Share(0, 2))
    first_look = iter([None])  # it came before the other share's record was written
    monkeypatch.setattr(draw_folder, "read_pinned", lambda folder: next(first_look, read_pinned(folder)))
    draw(target, tmp_path, shard=Share(1, 2))
    assert len(read_images(tmp_path)) == 5


def test_images_that_are_there_are_not_drawn_again_and_torn_or_missing_ones_are(target, tmp_path, drawn_prompts):
    draw(target, tmp_path)
    before = contents(tmp_path)
    torn, gone = tmp_path / "00003/samples/0001.png", tmp_path / "00005/samples/0000.png"
    torn.write_bytes(torn.read_bytes()[:-40])
    gone.unlink()
    drawn_prompts.clear()
    draw(target, tmp_path)
    assert sorted(drawn_prompts) == [("a blue circle", seed_of(4, 3, 1)), ("two squares", seed_of(4, 5, 0))]
    assert contents(tmp_path) == before
    drawn_prompts.clear()
    draw(target, tmp_path, num_images=6)
    assert drawn_prompts == [("two squares", seed_of(4, 5, 1))]
    assert read_pinned(tmp_path)["num_images"] == 6


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (DrawingSettings(seed=5, num_steps=2, guidance=2.0), "seed = 4, but now it is 5"),
        (DrawingSettings(seed=4, num_steps=3, guidance=2.0), "num_steps"),
        (DrawingSettings(seed=4, num_steps=2, guidance=1.0), "guidance"),
    ],
)
def test_a_folder_is_not_gone_on_with_by_other_options(target, tmp_path, how, word):
    draw(target, tmp_path)
    with pytest.raises(UserError, match=word):
        draw(target, tmp_path, how=how)


def test_a_folder_is_not_gone_on_with_at_another_resolution(target, tiny_checkpoint, tmp_path):
    draw(target, tmp_path, num_images=1)
    larger = open_target(str(tiny_checkpoint), options={"device": "cpu", "resolution": 32})
    with pytest.raises(UserError, match="resolution = 16, but now it is 32"):
        draw(larger, tmp_path, num_images=1)
    draw(larger, tmp_path / "larger", num_images=1)
    assert Image.open(tmp_path / "larger/00000/samples/0000.png").size == (32, 32)


def test_a_folder_is_continued_when_the_backbone_or_the_scheduler_has_a_newer_option(
    target, tiny_checkpoint, tmp_path, monkeypatch
):
    draw(target, tmp_path, num_images=1)
    pinned = read_pinned(tmp_path)
    # As an earlier diffusers would have left it; and from here on, the backbone is a later version's.
    del pinned["scheduler"]["thresholding"]
    (tmp_path / "drawing.json").write_text(json.dumps(pinned))
    change_options(monkeypatch, "backbones", "auto", newer=0.0)
    options = {"device": "cpu", "newer": 0.0}
    draw(open_target(str(tiny_checkpoint), options=options), tmp_path, num_images=2)
    assert len(contents(tmp_path)) == 2
    with pytest.raises(UserError, match="its images were drawn with backbone"):
        draw(open_target(str(tiny_checkpoint), options=options | {"newer": 0.5}), tmp_path, num_images=2)
    pinned["scheduler"]["thresholding"] = True
    (tmp_path / "drawing.json").write_text(json.dumps(pinned))
    with pytest.raises(UserError, match="its images were drawn with scheduler"):
        draw(target, tmp_path, num_images=2)


def test_a_folder_of_another_tool_or_of_other_prompts_is_not_drawn_into(target, tmp_path):
    draw(target, tmp_path / "a")
    other = {0: {"prompt": "a green star"}}
    with pytest.raises(UserError, match="another prompt"):
        draw_asked(target, tmp_path / "a", other, 1, HOW, Share())
    (tmp_path / "b/00000").mkdir(parents=True)
    with pytest.raises(UserError, match="another tool"):
        draw(target, tmp_path / "b")


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_a_share_that_is_none_is_told(text):
    with pytest.raises(UserError, match="1/4 for the first of four"):
        Share.parse(text)
    assert Share.parse("2/4") == Share(1, 4)


def one_image(folder, name="0000.png"):
    path = folder / "00000/samples" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "00000/metadata.jsonl").write_text('{"prompt": "a dog"}')
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_a_measurement_holds_for_its_image_and_how_it_was_made_only(tmp_path):
    image, kept = one_image(tmp_path), Measurements("scores", {"model": "a"})
    kept.write(image, [1, 2])
    assert kept.read(image) == [1, 2]
    assert Measurements("scores", {"model": "b"}).read(image) is None
    Image.new("RGB", (4, 4), "blue").save(image)
    assert kept.read(image) is None, "the image is another one now"
    kept.write(image, 3)
    kept.file(image).write_text(kept.file(image).read_text()[:20])
    assert kept.read(image) is None, "it is torn"


@pytest.mark.parametrize("name", ["00000.png", "0.jpg", "7.webp"])
def test_other_tools_names_and_formats_are_read(tmp_path, name):
    one_image(tmp_path, name)
    (tmp_path / "00000/samples/notes.txt").write_text("x")
    assert is_image_folder(tmp_path)
    assert [row.path.name for row in read_images(tmp_path)] == [name]


@pytest.mark.parametrize(
    ("text", "word"), [("{", "one JSON object"), ('{"text": "x"}', "no prompt"), ("[]", "no prompt")]
)
def test_broken_metadata_is_named(tmp_path, text, word):
    one_image(tmp_path)
    (tmp_path / "00000/metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"00000/metadata.jsonl.*{word}"):
        read_images(tmp_path)


def test_a_torn_image_of_another_tool_is_named(tmp_path, runner):
    image = one_image(tmp_path)
    image.write_bytes(image.read_bytes()[:-30])
    result = runner("eval", tmp_path, "--suite", "rewards", "--reward", "brightness")
    assert result.exit_code == 2 and "00000/samples/0000.png" in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def runner():
    from typer.testing import CliRunner

    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_shapes_from_shares_are_the_figures_of_one_process(runner, tiny_checkpoint, tmp_path):
    drawing = ("eval", tiny_checkpoint, "--num-images", 6, "--num-steps", 2, "--guidance", 1)
    whole = runner(*drawing, "--json", tmp_path / "whole.json")
    assert whole.exit_code == 0, whole.output
    first = runner(*drawing, "--images", tmp_path / "im", "--shard", "1/2")
    assert first.exit_code == 0 and first.stdout == "", first.output
    early = runner("eval", tmp_path / "im")
    assert early.exit_code == 2 and "3 of its 6 images" in early.stderr
    runner(*drawing, "--images", tmp_path / "im", "--shard", "2/2")
    gathered = runner("eval", tmp_path / "im", "--json", tmp_path / "gathered.json")
    assert gathered.exit_code == 0, gathered.output
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "gathered.json"))
    assert (one["images"], one["tags"]) == (two["images"], two["tags"])
    assert two["drawing"]["guidance"] == two["guidance"] == one["guidance"] == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--suite", "genevl"], "Did you mean 'geneval'?"),
        (["--suite", "shapes", "--detector", "x"], "--detector: goes with --suite geneval"),
        (["--suite", "geneval", "--reward", "x"], "--reward: goes with --suite editing or rewards"),
        (["--shard", "1/2"], "--images"),
        (["--images", "im", "--shard", "3/2"], "--shard 3/2"),
        (["--compare", "--against", "x"], "give one"),
    ],
)
def test_options_that_do_not_go_together_are_told(runner, tiny_checkpoint, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    result = runner("eval", tiny_checkpoint, *arguments)
    assert result.exit_code == 2 and word in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_shares_of_a_target_to_compare_with_need_a_folder_too(runner, tiny_checkpoint, tmp_path):
    drawn = runner("eval", tiny_checkpoint, "--num-images", 2, "--num-steps", 1, "--images", tmp_path / "im")
    assert drawn.exit_code == 0, drawn.output
    result = runner("eval", tmp_path / "im", "--against", tiny_checkpoint, "--shard", "1/2")
    assert result.exit_code == 2 and "--shard: the shares need a shared folder" in result.stderr


@pytest.mark.parametrize(
    "given",
    [("--guidance", 7), ("--num-steps", 30), ("--bank", "negative"), ("--guidance-bank", "negative"), ("--base", "x")]
    + [
        ("--dtype", "float16"),
        ("--resolution", 64),
        ("--backbone", "scheduler=ddim"),
        ("--against", "builtin:shapes-sd15", "--bank", "negative"),
    ],
)
def test_options_of_drawing_are_refused_for_images_that_are_drawn(runner, tmp_path, given):
    (tmp_path / "im/00000/samples").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "im/00000/samples/0000.png")
    (tmp_path / "im/00000/metadata.jsonl").write_text('{"prompt": "a red star"}')
    result = runner("eval", tmp_path / "im", *given)
    assert result.exit_code == 2 and "has no effect" in result.stderr and given[-2] in result.stderr, result.output


def test_the_backbone_s_other_options_are_given_on_the_command_line(runner, tiny_checkpoint, tmp_path):
    few = ("--num-images", 2, "--num-steps", 1, "--any-base", "--json", tmp_path / "eval.json")
    done = runner("eval", tiny_checkpoint, "--backbone", "scheduler=ddim", *few)
    assert done.exit_code == 0, done.output
    drawing = json.loads((tmp_path / "eval.json").read_text())["drawing"]
    assert drawing["scheduler"]["class"] == "DDIMScheduler" and drawing["backbone"]["scheduler"] == "ddim"
    for given, word in (("schedule=ddim", "schedule"), ("ddim", "--backbone ddim: write --backbone NAME=VALUE")):
        refused = runner("eval", tiny_checkpoint, "--backbone", given, *few)
        assert refused.exit_code == 2 and word in refused.stderr, refused.output


def test_a_number_of_images_that_a_suite_does_not_take_is_refused(runner, tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "own_suite.py").write_text(
        "from agsm_rl.evaluate.suites.shapes import Shapes\n\n\n"
        "class OfTen(Shapes):\n    def __init__(self) -> None:\n        super().__init__(num_images=10)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    named = ("--suite", "own_suite:OfTen", "--allow-import", "own_suite")
    result = runner("eval", tiny_checkpoint, *named, "--num-images", 3)
    sys.modules.pop("own_suite", None)
    assert result.exit_code == 2 and "--num-images: the suite own_suite:OfTen decides" in result.stderr, result.output


def test_a_folder_whose_name_is_a_digit_but_no_number_is_not_a_prompts(tmp_path):
    (tmp_path / "²").mkdir()
    (tmp_path / "²" / "metadata.jsonl").write_text('{"prompt": "a red star"}')
    assert not is_image_folder(tmp_path)


def test_a_lora_of_another_trainer_is_a_target_with_its_base(tiny_checkpoint, tmp_path, make_backbone):
    torch.manual_seed(0)
    policy = Policy(make_backbone(), {"lora": LoRA(rank=2)})
    for parameter in policy.parameters().values():
        parameter.data.normal_(std=0.3)
    (file,) = save_adapters(policy.adapters, tmp_path / "ours", metadata={})
    foreign = tmp_path / "theirs.safetensors"
    save_file(load_file(file), foreign)
    one, two, base = (
        open_target(*given, options={"device": "cpu"}, **more)
        for given, more in [
            ((str(tmp_path / "ours"),), {"base": str(tiny_checkpoint)}),
            ((str(foreign),), {"base": str(tiny_checkpoint)}),
            ((str(tiny_checkpoint),), {}),
        ]
    )
    drawn = [
        np.array(Image.open(draw_one(opened, tmp_path / name)))
        for opened, name in ((one, "1"), (two, "2"), (base, "3"))
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1 < np.abs(drawn[0].astype(int) - drawn[2]).max()
    assert read_pinned(tmp_path / "2")["adapters"] == {"theirs.safetensors": sha256(foreign)}
    with pytest.raises(UserError, match="not exported by agsm-rl"):
        open_target(str(foreign))


def draw_one(target, folder):
    draw(target, folder, num_images=1)
    return folder / "00000/samples/0000.png"


@pytest.mark.slow
def test_two_processes_draw_and_measure_together_and_one_gathers(tiny_checkpoint, tmp_path):
    # As in test_processes.py: `accelerate launch --cpu` starts one process only.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "agsm_rl"]
    options = [str(tiny_checkpoint), "--num-images", "6", "--num-steps", "2", "--images", str(tmp_path / "im")]
    command = [*launch, "eval", *options, "--json", str(tmp_path / "e.json")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "e.json").read_text())["num_images"] == 6
    assert done.stdout.count("strict (nothing else is") == 1
    assert len(list((tmp_path / "im").glob("*/verdicts/*.json"))) == 6

"""`agsm-rl sample`: many prompts, the base beside, negative prompts, and nothing that is there is overwritten."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from agsm_rl import UserError, attach, save_adapters
from agsm_rl.cli.commands import app
from agsm_rl.evaluate.captions import captioned_grid
from agsm_rl.sources.pairs import Pairs


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Run `agsm-rl sample ...` in an empty folder, with two steps."""
    monkeypatch.chdir(tmp_path)
    return lambda *given: CliRunner().invoke(app, ["sample", *map(str, given), "--num-steps", "2"])


@pytest.fixture
def adapter(policy, tiny_checkpoint, tmp_path):
    """A folder of exported adapters that change the picture."""
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.5)
    save_adapters(policy.adapters, tmp_path / "adapter", metadata={"checkpoint": str(tiny_checkpoint)})
    return "adapter"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_refused(result, *words):
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_pictures_that_are_there_are_kept(sample, tiny_checkpoint, tmp_path):
    first = sample(tiny_checkpoint, "a red star", "-n", 2, "-o", "out", "--guidance", 2)
    assert first.stdout.split() == ["out/seed-0.png", "out/seed-1.png", "out/grid.jpg"], first.output
    before = content(tmp_path / "out")
    again = sample(tiny_checkpoint, "a blue circle", "-n", 2, "-o", "out", "--guidance", 2)
    assert again.stdout.split() == ["out/seed-0-2.png", "out/seed-1-2.png", "out/grid-2.jpg"]
    after = content(tmp_path / "out")
    assert {name: after[name] for name in before} == before and len(after) == 6


def test_a_file_of_prompts_is_drawn_prompt_by_prompt(sample, tiny_checkpoint, tmp_path):
    (tmp_path / "prompts.csv").write_text("caption,id\na red star,1\na blue circle,2\na green square,3\n")
    how = ("--prompts", "prompts.csv", "--num-prompts", 2, "-n", 2, "--seed", 4, "--guidance", 2, "-o", "out")
    drawn = sample(tiny_checkpoint, *how)
    names = ["1-seed-4.png", "1-seed-5.png", "2-seed-4.png", "2-seed-5.png", "grid.jpg"]
    assert drawn.stdout.split() == [f"out/{name}" for name in names], drawn.output
    assert sample(tiny_checkpoint, "a blue circle", "--seed", 5, "--guidance", 2, "-o", "alone").exit_code == 0
    alone, many = Image.open(tmp_path / "alone/seed-5.png"), Image.open(tmp_path / "out/2-seed-5.png")
    assert max(high for _, high in Image.eval(alone, lambda x: x).getextrema()) > 0
    difference = [abs(a - b) for a, b in zip(alone.tobytes(), many.tobytes(), strict=True)]
    assert max(difference) <= 1  # a batch of four rounds differently from a batch of one


def test_with_captions_the_folder_is_a_data_set_that_later_pictures_join(sample, tiny_checkpoint, tmp_path, backbone):
    for prompt, number in (("a red star", 2), ("a blue circle, drawn", 1)):
        drawn = sample(tiny_checkpoint, prompt, "-n", number, "-o", "out", "--captions", "--guidance", 1)
        assert drawn.exit_code == 0, drawn.output
    source = Pairs("out", batch_size=3)
    source.bind("pairs", 0, SimpleNamespace(index=0, count=1))
    source.fit_to(backbone)
    assert sorted(source.prompt_texts()) == ["a blue circle, drawn", "a red star", "a red star"]


def test_a_data_set_is_not_mixed_with_the_pictures_of_the_base(sample, adapter, tmp_path):
    assert_refused(sample(adapter, "a red star", "--compare", "--captions", "-o", "out"), "--captions", "--compare")
    assert not (tmp_path / "out").exists()


def test_the_base_is_drawn_beside_from_the_same_noise(sample, adapter, tiny_checkpoint, tmp_path):
    drawn = sample(adapter, "a red star", "--compare", "-o", "out", "--guidance", 3)
    assert drawn.stdout.split() == ["out/seed-0.png", "out/seed-0-base.png", "out/grid.jpg"], drawn.output
    assert sample(tiny_checkpoint, "a red star", "-o", "base", "--guidance", 3).exit_code == 0
    assert content(tmp_path / "out")["seed-0-base.png"] == content(tmp_path / "base")["seed-0.png"]
    assert content(tmp_path / "out")["seed-0-base.png"] != content(tmp_path / "out")["seed-0.png"]


def test_a_negative_prompt_changes_the_picture_and_an_empty_one_does_not(sample, tiny_checkpoint, tmp_path):
    for out, given in {"none": [], "empty": ["--negative-prompt", ""], "blue": ["--negative-prompt", "blue"]}.items():
        assert sample(tiny_checkpoint, "a red star", "-o", out, "--guidance", 5, *given).exit_code == 0
    none, empty, blue = (content(tmp_path / out)["seed-0.png"] for out in ("none", "empty", "blue"))
    assert none == empty != blue


def test_what_cannot_be_drawn_is_refused_before_anything_is_written(sample, tiny_checkpoint, tmp_path):
    assert_refused(sample(tiny_checkpoint), "no prompt", "--prompts FILE")
    assert_refused(sample(tiny_checkpoint, "x", "--prompts", "y.txt"), "PROMPT and --prompts")
    assert_refused(sample("nowhere/base", "--prompts", "gone.txt"), "--prompts 'gone.txt'", "no such file")
    assert_refused(sample(tiny_checkpoint, "x", "--num-prompts", 2), "--num-prompts", "goes with --prompts")
    assert_refused(sample(tiny_checkpoint, "x", "--compare"), "--compare", "a base itself")
    how = ("--guidance", 1, "--negative-prompt", "blue")
    assert_refused(sample(tiny_checkpoint, "x", *how), "--negative-prompt", "no effect with guidance 1")
    assert not (tmp_path / "samples").exists()


def test_a_negative_prompt_has_no_place_where_guidance_uses_the_same_prompt(sample, adapter):
    how = ("--guidance-bank", "negative", "--guidance-prompt", "same", "--negative-prompt", "blue", "--guidance", 3)
    assert_refused(sample(adapter, "x", *how), "--negative-prompt", "--guidance-prompt empty")


def test_a_caption_makes_room_for_itself_under_its_picture():
    images = torch.zeros(3, 3, 32, 32)
    bare = captioned_grid(images, ["", "", ""], columns=2)
    one_line = captioned_grid(images, ["a red star", "", ""], columns=2)
    long = captioned_grid(images, ["a red star " * 40, "", ""], columns=2)
    titled = captioned_grid(images, ["", "", ""], columns=2, titles=("base", "trained"))
    assert bare.width == one_line.width == long.width == titled.width
    line = one_line.height - bare.height
    assert line > 0 and long.height == bare.height + 4 * line and titled.height > bare.height
    text = one_line.crop((6, 6 + 128, 134, 6 + 128 + line))
    assert min(low for low, _ in text.getextrema()) < 128  # there is ink


def test_only_the_command_line_is_told_to_add_a_base_for_a_lora_from_elsewhere(sample, tmp_path, backbone):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 4)}, tmp_path / "kohya.safetensors")
    assert_refused(sample("kohya.safetensors", "x"), "add --base", "agsm-rl convert")
    with pytest.raises(UserError, match="pipe.load_lora_weights") as raised:
        attach(backbone.pipeline, tmp_path / "kohya.safetensors")
    assert "--base" not in str(raised.value)

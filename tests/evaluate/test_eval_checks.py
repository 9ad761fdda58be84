"""Options of `agsm-rl eval`: each side is drawn by its own, and what would be ignored is refused."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate import suite
from agsm_rl.evaluate.draw_folder import DrawingSettings
from agsm_rl.evaluate.evaluate_target import EvalOptions, evaluate_target
from agsm_rl.evaluate.suite import Suite
from agsm_rl.evaluate.suites.rewards import RewardsResult
from agsm_rl.export.attach import save_adapters

REWARDS = ("--suite", "rewards", "--reward", "brightness")


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red star\na blue circle\n")
    return lambda *given: CliRunner().invoke(app, ["eval", *map(str, given)])


@pytest.fixture
def drawn(monkeypatch):
    """The prompts and seeds of what is really drawn."""
    found, real = [], suite.draw

    def spy(backbone, prompts, seeds, **how):
        found.extend(zip(prompts, seeds, strict=True))
        return real(backbone, prompts, seeds, **how)

    monkeypatch.setattr(suite, "draw", spy)
    return found


@pytest.fixture
def two_banks(policy, tiny_checkpoint, tmp_path):
    """Exported adapters whose two banks draw different pictures."""
    torch.manual_seed(0)
    for parameter in policy.parameters().values():
        parameter.data.normal_(std=0.3)
    save_adapters(policy.adapters, tmp_path / "adapter", metadata={"checkpoint": str(tiny_checkpoint)})
    return "adapter"


@pytest.fixture
def folder(tmp_path):
    """Images of another tool, with their prompts."""
    for index, prompt in enumerate(("a red star", "a blue circle")):
        samples = tmp_path / f"im/{index:05d}/samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"prompt": prompt}))
        Image.new("RGB", (8, 8), "red").save(samples / "0000.png")
    return "im"


def content(tmp_path):
    return json.loads((tmp_path / "e.json").read_text())


def assert_refused(result, *words):
    assert result.exit_code == 2 and "Traceback" not in result.stderr, result.output
    message = " ".join(result.stderr.split())
    for word in words:
        assert word in message, message


HOW = ("--prompts", "p.txt", "--num-steps", 2, "--guidance", 3, "--json", "e.json")


@pytest.mark.parametrize(
    ("given", "key", "ours", "others"),
    [
        (("--bank", "negative"), "bank", "negative", "positive"),
        (("--guidance-bank", "negative"), "guidance_bank", "negative", "positive"),
        (("--guidance-bank", "negative", "--guidance-prompt", "same"), "guidance_prompt", "same", "empty"),
    ],
)
def test_a_run_against_itself_compares_what_is_asked_of_it_with_its_usual_drawing(
    command, two_banks, tmp_path, given, key, ours, others
):
    result = command(two_banks, *REWARDS, *HOW, *given, "--against", two_banks)
    assert result.exit_code == 0, result.output
    found = content(tmp_path)
    assert (found["drawing"][key], found["other"]["drawing"][key]) == (ours, others)
    assert found["same_noise"] is True and found["difference"]["overall"]["value"] != 0


def test_a_run_on_another_base_is_compared_with_itself_on_its_own(command, two_banks, tmp_path, tiny_checkpoint):
    other = tmp_path / "other"
    other.symlink_to(tiny_checkpoint)
    result = command(two_banks, *REWARDS, *HOW, "--base", other, "--against", two_banks)
    assert result.exit_code == 0, result.output
    found = content(tmp_path)
    checkpoints = [side["drawing"]["backbone"]["checkpoint"] for side in (found, found["other"])]
    assert checkpoints == [str(other), str(tiny_checkpoint)]


def test_options_of_prompts_and_noise_are_refused_for_images_that_are_drawn_in_one_message(command, folder):
    given = ("--prompts", "p.txt", "--prompt-column", "zzz", "--seed", 0, "--num-images", 1)
    result = command(folder, *REWARDS, *given)
    assert_refused(result, "--num-images, --seed, --prompts, --prompt-column: have no effect, im is already drawn")
    assert command(folder, *REWARDS).exit_code == 0


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (("--suite", "geneval", "--seed", "3"), "--seed: has no effect"),
        (("--suite", "shapes", "--any-base"), "--any-base: has no effect"),
        (("--suite", "rewards", "--reward", "brightness", "--option", "prompts=p.txt"), "--option prompts: has no"),
        (("--suite", "editing", "--option", "strength=0.5"), "--option strength: has no effect"),
        (("--suite", "rewards", "--reward", "brightness", "--against", "im", "--seed", "3"), "--seed: has no effect"),
    ],
)
def test_an_option_that_changes_nothing_of_existing_images_is_named(command, folder, given, word):
    assert_refused(command(folder, *given), word)


def test_the_seed_of_the_shapes_world_tells_which_split_a_folder_is_of(command, tmp_path, tiny_checkpoint):
    few = ("--num-images", 2, "--num-steps", 1, "--seed", 4, "--split", "validation")
    assert command(tiny_checkpoint, *few, "--images", "kept").exit_code == 0
    for more, split in (((), None), (("--seed", 4, "--split", "validation"), "validation")):
        result = command("kept", *more, "--json", "e.json")
        assert result.exit_code == 0, result.output
        assert content(tmp_path)["split"] == split


@pytest.fixture
def kept(command, tiny_checkpoint):
    """A folder that records its seed and its suffix."""
    how = ("--prompts", "p.txt", "--num-steps", 1, "--seed", 7, "--prompt-suffix", ", best", "--images", "kept")
    assert command(tiny_checkpoint, *REWARDS, *how).exit_code == 0
    return "kept"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("given", "word"),
    [
        (("--seed", 5), "--seed 5: kept was drawn with 7"),
        (("--seed", 0), "--seed 0: kept was drawn with 7"),
        (("--prompt-suffix", ", bad"), "--prompt-suffix ', bad': kept was drawn with ', best'"),
        (("--prompt-suffix", ""), "--prompt-suffix '': kept was drawn with ', best'"),
        (("--prompts", "q.txt"), "00001/metadata.jsonl has the prompt 'a blue circle', but it should be 'a dog'"),
    ],
)
def test_a_model_is_not_drawn_unlike_the_folder_beside_it(
    command, kept, tmp_path, tiny_checkpoint, drawn, given, word, turned
):
    (tmp_path / "q.txt").write_text("a red star\na dog\n")
    drawn.clear()
    sides = (kept, "--against", tiny_checkpoint) if turned else (tiny_checkpoint, "--against", kept)
    assert_refused(command(*sides, *REWARDS, *given), word, "leave the option out")
    assert drawn == []


def test_what_agrees_with_the_folder_may_be_said(command, kept, tiny_checkpoint, drawn):
    equal = ("--seed", 7, "--prompt-suffix", ", best", "--prompts", "p.txt")
    drawn.clear()
    result = command(tiny_checkpoint, *REWARDS, *equal, "--against", kept)
    assert result.exit_code == 0, result.output
    assert drawn == [("a red star, best", 7), ("a blue circle, best", 8)]


def test_a_model_beside_images_of_another_tool_is_drawn_as_is_said(command, folder, tiny_checkpoint, drawn):
    result = command(folder, *REWARDS, "--against", tiny_checkpoint, "--seed", 5, "--prompt-suffix", "!")
    assert result.exit_code == 0, result.output
    assert drawn == [("a red star!", 5), ("a blue circle!", 6)]


class Light(Suite):
    """How bright pictures are, whatever they were drawn for."""

    name, needs_prompts = "light", False
    asked = {0: {"prompt": "a lamp"}, 1: {"prompt": "a cave"}}

    def __init__(self, num_images=2):
        self.num_images = num_images

    def prompts(self):
        if not self.asked:
            raise UserError("suite light: no prompts")
        return self.asked

    def judge(self, images, prompts, metadata):
        return [image.convert("L").resize((1, 1)).getpixel((0, 0)) for image in images]

    def result(self, judged):
        lights = {place: [float(item.row)] for place, item in enumerate(judged)}
        return RewardsResult({"light": lights}, dict.fromkeys(lights, ""), {"light": 1.0})


@pytest.fixture
def pictures(tmp_path):
    """Two pictures without prompts."""
    (tmp_path / "plain").mkdir()
    for light in (100, 200):
        Image.new("L", (8, 8), light).save(tmp_path / "plain" / f"{light}.png")
    return str(tmp_path / "plain")


@pytest.mark.parametrize("turned", [False, True])
def test_a_model_beside_pictures_without_prompts_is_drawn_for_the_suite_s(pictures, tiny_checkpoint, drawn, turned):
    sides = [pictures, str(tiny_checkpoint)][:: -1 if turned else 1]
    how = DrawingSettings(num_steps=1, guidance=1.0)
    found = evaluate_target(sides[0], Light(), EvalOptions(against=sides[1], drawing=how))
    assert drawn == [("a lamp", 0), ("a cave", 1)]
    assert found["num_images"] == found["other"]["num_images"] == 2


@pytest.mark.parametrize("turned", [False, True])
def test_a_model_is_not_drawn_beside_another_number_of_pictures_or_for_no_prompt(
    pictures, tiny_checkpoint, drawn, turned, monkeypatch
):
    sides = [pictures, str(tiny_checkpoint)][:: -1 if turned else 1]
    with pytest.raises(UserError, match="plain: has 2 pictures, but 3 would be drawn.*--num-images 2"):
        evaluate_target(sides[0], Light(3), EvalOptions(against=sides[1]))
    monkeypatch.setattr(Light, "asked", {})
    with pytest.raises(UserError, match="no prompts"):
        evaluate_target(sides[0], Light(), EvalOptions(against=sides[1]))
    assert drawn == []


def test_fid_of_pictures_takes_prompts_only_where_a_model_is_drawn_for_them(command, pictures):
    given = ("--suite", "fid", "--reference", pictures, "--prompts", "p.txt")
    assert_refused(command(pictures, *given), "--prompts: has no effect")

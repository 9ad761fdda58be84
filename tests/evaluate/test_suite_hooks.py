"""What a suite may add to the way it is measured: pictures without prompts, and results that other tools read."""

from pathlib import Path

import pytest
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.evaluate.evaluate_target import EvalOptions, evaluate_target
from agsm_rl.evaluate.suite import Suite
from agsm_rl.evaluate.suites.rewards import RewardsResult


class Brightness(Suite):
    """How bright pictures are, whatever they were drawn for."""

    name, num_images, needs_prompts = "brightness", 2, False

    def prompts(self):
        return {0: {"prompt": "a lamp"}, 1: {"prompt": "a cave"}}

    def judge(self, images, prompts, metadata):
        return [{"light": image.convert("L").resize((1, 1)).getpixel((0, 0))} for image in images]

    def result(self, judged):
        lights = {item.number: [item.row["light"]] for item in judged}
        return RewardsResult({"light": lights}, dict.fromkeys(lights, ""), {"light": 1.0})

    def write_results(self, result, folder):
        (folder / "lights.txt").write_text(str(result.scores()["light"].value))


class Asking(Brightness):
    needs_prompts = True


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "plain").mkdir()
    for light in (100, 200):
        Image.new("L", (8, 8), light).save(tmp_path / "plain" / f"{light}.png")
    return tmp_path / "plain"


def test_a_suite_that_needs_no_prompts_judges_a_folder_of_pictures_and_writes_nothing_to_it(pictures):
    before = sorted(pictures.iterdir())
    content = evaluate_target(str(pictures), Brightness(), EvalOptions())
    assert content["overall"] == 150 and sorted(pictures.iterdir()) == before


def test_a_suite_that_needs_prompts_takes_no_folder_of_pictures(pictures):
    with pytest.raises(UserError):
        evaluate_target(str(pictures), Asking(), EvalOptions())


def test_a_suite_writes_its_results_beside_the_pictures_of_a_folder_with_prompts(pictures):
    for index, picture in enumerate(sorted(pictures.iterdir())):
        samples = pictures.parent / "drawn" / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text('{"prompt": "a lamp"}')
        picture.rename(samples / "0000.png")
    evaluate_target(str(pictures.parent / "drawn"), Asking(), EvalOptions())
    assert (pictures.parent / "drawn/lights.txt").is_file()


def test_results_are_refused_by_a_suite_that_cannot_read_them(tmp_path):
    with pytest.raises(UserError, match="the suite brightness does not read results; give a folder of images"):
        evaluate_target(str(tmp_path / "results.jsonl"), Brightness(), EvalOptions())

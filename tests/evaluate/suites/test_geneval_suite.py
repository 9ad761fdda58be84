"""`agsm-rl eval --suite geneval`: whole over drawn images, and its verdicts against a computation of their own."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import yaml
from agsm_rl_rewards.geneval.detector import CLASSIFIER, DETECTOR, STORED_ABOVE
from agsm_rl_rewards.geneval.rules import COLORS
from PIL import Image
from tiny_detectors import save_tiny_clip, save_tiny_detector
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.image_folder import Measurements
from agsm_rl.evaluate.suites.geneval import GenEval, read_results, write_results
from agsm_rl.export.attach import save_adapters
from agsm_rl.report.eval_file import read_evaluation


def recomputed(objects, asked):
    """GenEval's verdict from stored detections, written down once more: True or False."""
    least = 0.9 if asked["tag"] == "counting" else 0.3
    of = {}
    for row in sorted(objects, key=lambda row: row["score"], reverse=True):
        if row["score"] > least:
            of.setdefault(row["class"], []).append(row)
    of = {name: rows[:16] for name, rows in of.items()}
    good, chosen = True, []
    for need in asked["include"]:
        rows = of.get(need["class"], [])[: need["count"]]
        ok = len(rows) == need["count"]
        if ok and "color" in need:
            ok = all(max(row["colors"].items(), key=lambda pair: pair[1])[0] == need["color"] for row in rows)
        if ok and "position" in need:
            where, index = need["position"]
            ok = chosen[index] is not None and all(lies(row, other, where) for row in rows for other in chosen[index])
        chosen.append(rows if ok else None)
        good = good and ok
    return good and all(len(of.get(ban["class"], [])) < ban["count"] for ban in asked.get("exclude", []))


def lies(row, other, where):
    (ax, ay, bx, by), (cx, cy, dx, dy) = row["box"], other["box"]
    x, y = (ax + bx - cx - dx) / 2, (ay + by - cy - dy) / 2
    far_x = max(abs(x) - 0.1 * (bx - ax + dx - cx), 0)
    far_y = max(abs(y) - 0.1 * (by - ay + dy - cy), 0)
    length = math.hypot(x, y) or 1
    side = {"left of": (x < 0, far_x), "right of": (x > 0, far_x), "above": (y < 0, far_y), "below": (y > 0, far_y)}
    return side[where][0] and side[where][1] / length > 0.5


def write_prompt(folder, index, metadata, pictures):
    place = folder / f"{index:05d}"
    (place / "samples").mkdir(parents=True)
    (place / "metadata.jsonl").write_text(json.dumps(metadata))
    for number, picture in enumerate(pictures):
        picture.save(place / "samples" / f"{number:04d}.png")


def stored(folder):
    """(metadata, stored detections) of each image, read from the files alone."""
    for file in sorted(folder.glob("*/detections/*.json")):
        metadata = json.loads((file.parents[1] / "metadata.jsonl").read_text())
        yield metadata, json.loads(file.read_text())["found"]["seen"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    detector, clip = save_tiny_detector(root / "detector"), save_tiny_clip(root / "clip")
    return ["--suite", "geneval", "--detector", str(detector), "--classifier", str(clip)]


def test_the_suite_has_geneval_s_553_prompts_balanced_from_the_first_on():
    asked = GenEval().prompts()
    tags = Counter(row["tag"] for row in asked.values())
    assert tags == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert GenEval().num_images == 4 * 553
    assert {row["tag"] for row in list(asked.values())[:6]} == set(tags)
    assert asked[0] == {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a photo of a bench",
    }


def test_the_whole_suite_over_drawn_images_and_its_verdicts_are_those_of_the_stored_detections(
    command, models, tiny_checkpoint, tmp_path
):
    drawn = ("--images", "im", "--num-images", 8, "--num-steps", 2, "--json", "e.json")
    result = command(tiny_checkpoint, *models, *drawn)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["suite"] == "geneval" and content["label"].startswith("GenEval-compatible")
    assert content["num_images"] == 8 == sum(row["total"] for row in content["tags"].values())
    assert content["drawing"]["scheduler"]["class"] == "DDIMScheduler" and content["num_steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "im/results.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    expected = {metadata["prompt"]: recomputed(seen, metadata) for metadata, seen in stored(tmp_path / "im")}
    assert {line["prompt"]: line["correct"] for line in lines} == expected and len(expected) == 8
    assert all(line["correct"] is (line["reason"] == "") for line in lines)


def test_base_against_trained_is_what_a_report_reads(command, models, tiny_checkpoint, tmp_path, make_policy):
    save_adapters(make_policy().adapters, tmp_path / "adapter", metadata={})
    how = ("--images", "im", "--num-images", 6, "--num-steps", 1, "--guidance", 2, "--json", "e.json")
    result = command("adapter", "--base", tiny_checkpoint, *models, *how, "--compare")
    assert result.exit_code == 0, result.output
    found = read_evaluation(tmp_path / "e.json").first
    assert (found.suite, found.split, found.guidances, found.score_names) == ("geneval", "GenEval", [2.0], ["correct"])
    lines = read_results(tmp_path / "im/results.jsonl").rows
    judged = found.trained[2.0]
    assert dict(zip(judged.files, judged.values["correct"], strict=True)) == {
        row.filename: row.correct for row in lines
    }
    for judged in (found.base[2.0], found.trained[2.0]):
        assert len(judged.files) == 6 and all((tmp_path / file).is_file() for file in judged.files)


def test_a_base_that_is_drawn_once_is_what_each_run_is_compared_with(
    command, models, tiny_checkpoint, tmp_path, make_policy
):
    how = ("--num-images", 6, "--num-steps", 1, "--guidance", 2)
    assert command(tiny_checkpoint, *models, *how, "--images", "base").exit_code == 0
    backbone = {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "unet": None, "device": "cpu"}
    save_adapters(make_policy().adapters, tmp_path / "run/adapter", metadata={})
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump({"backbone": backbone}))
    # Guidance and steps are those that the base was drawn with, not the run's own.
    images = ("--images", "run/geneval", "--json", "run/e.json")
    result = command("run", *models, *images, "--against", "base")
    assert result.exit_code == 0, result.output
    found = read_evaluation(tmp_path / "run/e.json").first
    assert (found.guidances, found.num_steps, len(found.prompts)) == ([2.0], 1, 6)
    for judged, place in ((found.base[2.0], "base"), (found.trained[2.0], "run/geneval")):
        assert all((tmp_path / "run" / file).resolve().is_relative_to(tmp_path / place) for file in judged.files)
    assert command("run", *models, *images, "--against", "base", "--num-images", 4).exit_code == 2
    # Another trained model is no base.
    content = json.loads((tmp_path / "run/e.json").read_text())
    content["other"]["drawing"]["adapters"] = {"tokens.safetensors": "0"}
    (tmp_path / "run/e.json").write_text(json.dumps(content))
    measured = read_evaluation(tmp_path / "run/e.json")
    assert measured.first.base == {} and measured.other is not None
    assert measured.other[1].first.images == measured.first.images


def test_prompts_that_the_detector_sees_give_right_and_wrong_images_as_recomputed(command, models, tmp_path):
    rng = np.random.default_rng(0)
    objects = ["clock", "cake", "zebra", "banana", "backpack", "cow"]
    for index, name in enumerate(objects):
        wanted = {"class": name, "count": 1}
        rows = [
            {"tag": "single_object", "include": [wanted]},
            {"tag": "colors", "include": [wanted | {"color": "brown"}]},
        ]
        rows.append({"tag": "two_object", "include": [wanted], "exclude": [{"class": "clock", "count": 2}]})
        for part, metadata in enumerate(rows):
            pictures = [Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)) for _ in range(2)]
            write_prompt(tmp_path / "theirs", 3 * index + part, metadata | {"prompt": f"{name} {part}"}, pictures)
    result = command("theirs", *models, "--json", "e.json")
    assert result.exit_code == 0, result.output
    expected = [recomputed(seen, metadata) for metadata, seen in stored(tmp_path / "theirs")]
    assert [row.correct for row in read_results(tmp_path / "theirs/results.jsonl").rows] == expected
    assert len(expected) == 36 and 0 < sum(expected) < 36
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["drawing"] is None and content["correct_images"]["score"] == pytest.approx(sum(expected) / 36)


def invented(rng, metadata):
    """Detections that are often what was asked for, with every figure near what decides."""
    found = []
    for wanted in metadata["include"]:
        for _ in range(int(wanted["count"] + rng.integers(-1, 2))):
            left, top = rng.integers(0, 60, 2)
            width, height = rng.integers(5, 40, 2)
            colors = {color: float(rng.random()) for color in COLORS}
            colors[wanted.get("color", "red")] += 0.6
            score = float(rng.choice([0.2, 0.3, 0.35, 0.85, 0.9, 0.95, 0.99]))
            box = [float(side) for side in (left, top, left + width, top + height)]
            found.append({"class": wanted["class"], "score": score, "box": box, "colors": colors})
    return found


def test_verdicts_on_all_553_prompts_are_those_of_the_stored_detections_without_any_detector(command, tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.new("RGB", (4, 4))
    kept = Measurements("detections", {"detector": DETECTOR, "classifier": CLASSIFIER, "above": STORED_ABOVE})
    for index, metadata in GenEval().prompts().items():
        write_prompt(tmp_path / "im", index, metadata, [picture])
        path = tmp_path / "im" / f"{index:05d}" / "samples" / "0000.png"
        kept.write(path, {"size": [4, 4], "seen": invented(rng, metadata)})
    result = command("im", "--suite", "geneval", "--json", "e.json")
    assert result.exit_code == 0, result.output
    expected = [(metadata, recomputed(seen, metadata)) for metadata, seen in stored(tmp_path / "im")]
    assert [row.correct for row in read_results(tmp_path / "im/results.jsonl").rows] == [good for _, good in expected]
    content = json.loads((tmp_path / "e.json").read_text())
    for tag, row in content["tags"].items():
        marks = [good for metadata, good in expected if metadata["tag"] == tag]
        assert (row["correct"], row["total"]) == (sum(marks), len(marks)) and 0 < sum(marks) < len(marks)
        assert row["low"] < row["score"] < row["high"]
    assert content["overall"] == pytest.approx(np.mean([row["score"] for row in content["tags"].values()]))
    assert content["over_prompts"]["low"] < content["overall"] < content["over_prompts"]["high"]
    # The file alone gives the same figures.
    again = command("im/results.jsonl", "--suite", "geneval", "--json", "again.json")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again.json").read_text())["tags"] == content["tags"]


def line(prompt, number, correct, tag="colors"):
    metadata = {"tag": tag, "prompt": prompt, "include": [{"class": "dog", "count": 1}]}
    row = {"filename": f"out/{prompt:05d}/samples/{number:05d}.png", "tag": tag, "prompt": f"p{prompt}"}
    row |= {"correct": correct, "reason": "", "metadata": json.dumps(metadata), "details": "{}"}
    return json.dumps(row)


def test_two_results_are_compared_image_by_image_whatever_their_order(command, tmp_path):
    ours = [(prompt, number, (prompt + number) % 3 > 0) for prompt in range(10) for number in range(2)]
    theirs = [(prompt, number, correct and prompt > 2) for prompt, number, correct in ours]
    (tmp_path / "a.jsonl").write_text("\n".join(line(*row) for row in ours))
    (tmp_path / "b.jsonl").write_text("\n".join(line(*row) for row in reversed(theirs)))
    result = command("a.jsonl", "--suite", "geneval", "--against", "b.jsonl", "--json", "e.json")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "e.json").read_text())
    changed = sum(row != other for row, other in zip(ours, theirs, strict=True))
    assert content["difference"]["tags"]["colors"]["value"] == pytest.approx(changed / 20)
    assert content["same_verdict"]["score"] == pytest.approx(1 - changed / 20)
    (tmp_path / "b.jsonl").write_text("\n".join(line(*row) for row in theirs[:-1]))
    missing = command("a.jsonl", "--suite", "geneval", "--against", "b.jsonl")
    assert missing.exit_code == 2 and "on different prompts or images" in missing.stderr


def test_results_are_read_back_as_they_were_written(tmp_path):
    (tmp_path / "a.jsonl").write_text(line(3, 1, True) + "\n\n" + line(4, 0, False, "position") + "\n")
    found = read_results(tmp_path / "a.jsonl")
    assert [row.key for row in found.rows] == [(3, 1), (4, 0)]
    write_results(found, tmp_path / "b.jsonl")
    assert read_results(tmp_path / "b.jsonl") == found


@pytest.mark.parametrize("broken", ["{", "[]", '{"filename": "x"}', '{"metadata": "{", "details": "{}"}'])
def test_a_line_that_is_no_result_is_named(tmp_path, broken):
    (tmp_path / "a.jsonl").write_text(line(3, 1, True) + "\n" + broken)
    with pytest.raises(UserError, match="line 2"):
        read_results(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({"prompt": "a dog"}, "no .tag. or no .include."),
        ({"prompt": "x", "tag": "colors", "include": [{"class": "unicorn", "count": 1}]}, "COCO's 80"),
        ({"prompt": "x", "tag": "colors", "include": [{"class": "dog", "count": 1, "color": "teal"}]}, "teal"),
        (
            {"prompt": "x", "tag": "position", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},
            "earlier",
        ),
    ],
)
def test_images_whose_metadata_geneval_cannot_judge_are_refused_by_name(command, tmp_path, metadata, word):
    write_prompt(tmp_path, 7, metadata, [Image.new("RGB", (4, 4))])
    result = command(tmp_path, "--suite", "geneval")
    assert result.exit_code == 2
    assert re.search("00007/metadata.jsonl.*" + word, result.stderr.replace("\n", " "))

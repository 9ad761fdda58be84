"""Images stand with their own verdicts, and only those in a run's folder are taken."""

import json

import pytest
from making_runs import by_geneval, not_evaluated, write_run
from PIL import Image
from reading_pages import entries, page


def test_pictures_outside_a_run_s_folder_are_not_taken(tmp_path):
    run = by_geneval(write_run(tmp_path / "mine"), trained=0.8)
    (run / "geneval").rename(tmp_path / "elsewhere")
    content = (run / "eval.json").read_text()
    (run / "eval.json").write_text(content.replace(str(run / "geneval"), str(tmp_path / "elsewhere")))
    assert page(run).suite["pictures"]["images"] == {}


def test_a_link_out_of_a_run_s_folder_is_not_followed(tmp_path):
    run, other = write_run(tmp_path / "mine"), not_evaluated(write_run(tmp_path / "other"))
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    for picture in [*run.rglob("0*.png"), *other.rglob("*.png")]:
        picture.unlink()
        picture.symlink_to(tmp_path / "private.png")
    assert page(run).suite["pictures"]["images"] == {}
    assert not any(str(one).startswith("data:image") for one in page(other).references)


@pytest.mark.parametrize("harm", ["null byte", "not all", "a verdict of another suite"])
def test_what_is_odd_in_an_evaluation_by_geneval_costs_pictures_at_most(tmp_path, harm):
    run = by_geneval(write_run(tmp_path / "mine"), trained=0.8)
    content = json.loads((run / "eval.json").read_text())
    for row in [*content["images"], *content["base"]["images"]]:
        row |= {"filename": "a\0b"} if harm == "null byte" else {"strict": True} if harm.startswith("a verdict") else {}
    if harm == "not all":
        del content["images"][3]["filename"]
    (run / "eval.json").write_text(json.dumps(content))
    found = page(run).suite
    assert list(found["scores"]) == ["correct"]
    assert bool(found["pictures"]["shown"].get("4", {}).get("variants")) is harm.startswith("a verdict")


def test_each_image_stands_with_its_own_verdict_and_equal_images_are_kept_once(sweep):
    found = page(sweep).suite["pictures"]
    run = sweep / "cells" / "strong-seed0"
    rows = found["shown"]["2"]["variants"]["strong"]
    for number, shot in enumerate(rows[:2]):
        verdict = entries(run)[2.0]["images"][number]
        assert (shot["strict"], shot["correct"], shot["reason"]) == tuple(
            verdict[k] for k in ("strict", "correct", "reason")
        )
        assert found["images"][shot["image"]].startswith("data:image/png;base64,")
    assert rows[2] is None  # only two were kept
    assert len(found["images"]) == 4  # base and trained, two each, the same at all guidances

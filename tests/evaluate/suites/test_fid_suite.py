"""FID: the distance of two sets of images by an injected network, and what is told where Inception is not there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from typer.testing import CliRunner

from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.image_folder import read_images
from agsm_rl.evaluate.kept_rows import judged_in_memory
from agsm_rl.evaluate.suites import fid
from agsm_rl.evaluate.suites.fid import FID


class MeanAndSpread(nn.Module):
    """Features [B, 4] of uint8 images [B, 3, H, W]."""

    num_features = 4

    def forward(self, images):
        values = images.float() / 255
        return torch.cat([values.mean((2, 3)), values.std((1, 2, 3))[:, None]], dim=1)


def write_pictures(folder, count, seed, *, geneval=False, scale=1.0):
    rng = np.random.default_rng(seed)
    for index in range(count):
        size = (6, 8, 3) if index % 3 else (8, 6, 3)
        pixels = (rng.random(size) * scale * rng.random(3) * 255).astype(np.uint8)
        path = folder / f"{index:05d}/samples/0000.png" if geneval else folder / f"part{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        if geneval:
            (path.parents[1] / "metadata.jsonl").write_text(json.dumps({"prompt": "x"}))
    return folder


def features(paths):
    images = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] for path in paths]
    return torch.cat([MeanAndSpread()(image) for image in images]).double().numpy()


def suite_of(real):
    suite = FID(reference=str(real))
    suite.network = MeanAndSpread()
    return suite


def distance(suite, images):
    return suite.result(judged_in_memory(suite, images, at_once=4))


def test_the_distance_is_that_of_two_gaussians_on_the_features(tmp_path):
    real = write_pictures(tmp_path / "real", 20, 0)
    drawn = write_pictures(tmp_path / "drawn", 15, 1, geneval=True, scale=0.7)
    result = distance(suite_of(real), read_images(drawn))
    a, b = features(sorted(real.rglob("*.png"))), features(sorted(drawn.rglob("*.png")))
    spread_a, spread_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected += np.trace(spread_a + spread_b - 2 * np.real(sqrtm(spread_a @ spread_b)))
    assert result.distance == pytest.approx(expected, rel=1e-3)
    content = result.to_json()
    assert (content["suite"], content["num_images"], content["num_reference"]) == ("fid", 15, 20)
    assert content["overall"] == result.distance and content["network"] == "MeanAndSpread"


def test_a_second_target_is_measured_afresh_against_the_same_reference(tmp_path):
    real = write_pictures(tmp_path / "real", 12, 0)
    suite = suite_of(real)
    near = read_images(write_pictures(tmp_path / "near", 12, 0, geneval=True))
    far = read_images(write_pictures(tmp_path / "far", 12, 3, geneval=True, scale=0.3))
    first, second = distance(suite, near), distance(suite, far)
    assert first.distance == pytest.approx(0, abs=1e-4) and second.distance > 0.01
    assert distance(suite, near).distance == pytest.approx(first.distance, abs=1e-9)
    assert second.against(first)["difference"]["overall"]["value"] == second.distance - first.distance
    fewer = distance(suite, near[:5])
    with pytest.raises(UserError, match="depends on the number"):
        fewer.against(first)


def test_the_reference_is_looked_through_once_and_not_for_every_batch(tmp_path):
    suite = suite_of(write_pictures(tmp_path / "real", 3, 0))
    suite.prepare()
    (tmp_path / "real").rename(tmp_path / "moved")
    assert len(suite.judge([Image.new("RGB", (8, 6))] * 2, ["x"] * 2, [{}] * 2)) == 2


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["eval", *arguments, "--suite", "fid"])


def test_what_is_missing_is_told_before_anything_is_drawn(command, tmp_path, tiny_checkpoint, monkeypatch):
    write_pictures(tmp_path / "real", 3, 0)
    (tmp_path / "p.txt").write_text("a red star\n")
    prompts = (str(tiny_checkpoint), "--prompts", "p.txt", "--images", "im")
    assert "--reference" in command(*prompts).stderr
    assert "no such folder" in command(*prompts, "--reference", "nowhere").stderr
    monkeypatch.setattr(fid, "find_spec", lambda name: None)
    result = command(*prompts, "--reference", "real")
    assert result.exit_code == 2 and "agsm-rl[fid]" in result.stderr and "Traceback" not in result.stderr
    monkeypatch.setattr(fid, "find_spec", lambda name: object())
    result = command(*prompts, "--reference", "real", "--inception", "inception.pth")
    assert result.exit_code == 2 and f"curl -L --create-dirs -o inception.pth {fid.URL}" in result.stderr
    assert not (tmp_path / "im").exists()


def test_a_plain_folder_of_pictures_has_no_base(command, tmp_path):
    for name in ("real", "mine"):
        write_pictures(tmp_path / name, 3, 0)
    plain = str(tmp_path / "mine" / "part0")
    result = command(plain, "--reference", "real", "--compare")
    assert result.exit_code == 2 and "has no base" in result.stderr


def test_weights_that_would_run_code_are_refused(tmp_path):
    torch.save({"a": MeanAndSpread()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="bad.pth: is not a file of Inception weights"):
        fid._check_weights(tmp_path / "bad.pth")

"""DDPO's JPEG rewards."""

import pytest
import torch
from agsm_rl_rewards.jpeg import JpegCompressibility, JpegIncompressibility


def test_a_plain_image_is_more_compressible_than_noise():
    plain = torch.full((3, 64, 64), 0.5)
    noisy = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = JpegCompressibility()(torch.stack([plain, noisy]), ["", ""])
    assert scores[0] > scores[1]
    assert scores.max() < 0


def test_incompressibility_is_its_opposite():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(JpegIncompressibility()(images, ["", ""]), -JpegCompressibility()(images, ["", ""]))


def test_the_size_is_that_of_the_file(tmp_path):
    from PIL import Image

    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    size = (tmp_path / "x.jpg").stat().st_size / 1000
    assert JpegIncompressibility()(images, [""]).item() == pytest.approx(size, rel=1e-6)

"""Mask2Former's outputs become boxes at the image's own size, CLIP's become colours, and wrong models are refused."""

import shutil

import numpy as np
import pytest
import torch
from agsm_rl_rewards.geneval.detector import Detector, box_of, detections, instances
from agsm_rl_rewards.geneval.requirements import object_names
from agsm_rl_rewards.geneval.rules import COLORS
from PIL import Image
from tiny_detectors import save_tiny_clip, save_tiny_detector
from torch.nn.functional import normalize

from agsm_rl.errors import UserError


def logits_of(probabilities):
    """Class logits [Q, classes + 1] whose softmax these are."""
    return torch.tensor(probabilities).log()


def test_a_query_is_scored_by_its_class_and_by_its_mask_and_boxed_at_the_image_size():
    classes = logits_of([[0.8, 0.1, 0.1], [0.02, 0.9, 0.08]])
    masks = torch.full((2, 4, 8), -50.0)
    masks[0, :, :4] = 50.0
    masks[1, 2:, 4:] = 50.0
    scores, labels, found = instances(classes, masks, (16, 32), (40, 80))
    # The mask's pixels are all but certain, the class's probability is the score; 0.02 is not kept.
    assert labels == [1, 0, 1]
    assert scores == pytest.approx([0.9, 0.8, 0.1], rel=0.02)
    assert [box_of(mask) for mask in found] == [(40, 20, 80, 40), (0, 0, 40, 40), (0, 0, 40, 40)]


def test_an_uncertain_mask_lowers_the_score():
    classes = logits_of([[0.8, 0.1, 0.1]])
    scores, _, _ = instances(classes, torch.zeros(1, 4, 4) + 0.4, (8, 8), (8, 8))
    assert scores[0] == pytest.approx(0.8 * torch.sigmoid(torch.tensor(0.4)).item(), rel=1e-4)


def test_a_query_without_a_mask_is_nothing():
    scores, _, found = instances(logits_of([[0.8, 0.1, 0.1]]), torch.full((1, 4, 4), -1.0), (8, 8), (8, 8))
    assert scores == [] and found == []
    assert box_of(np.zeros((4, 4), dtype=bool)) is None


def test_the_80_classes_are_those_that_the_prompts_use():
    names = object_names()
    assert len(names) == len(set(names)) == 80 and names[0] == "person" and names[-1] == "toothbrush"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("detectors")
    return str(save_tiny_detector(root / "detector")), str(save_tiny_clip(root / "clip"))


@pytest.fixture(scope="module")
def detector(folders):
    return Detector(*folders, device="cpu")


def picture(seed, size=(64, 48)):
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    for _ in range(3):
        x, y = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 15)
        pixels[y : y + 15, x : x + 20] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


def test_detections_come_by_falling_confidence_within_the_picture_and_colored_where_asked(detector):
    found = detector(picture(0), {"clock"})
    scores = [item["score"] for item in found]
    assert scores == sorted(scores, reverse=True) and min(scores) > 0.05 and max(scores) <= 1
    assert any(item["class"] == "clock" for item in found)
    for item in found:
        left, top, right, bottom = item["box"]
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 48
        assert ("colors" in item) is (item["class"] == "clock")
    taken = next(item for item in detections(found) if item.name == "clock")
    colors = next(item["colors"] for item in found if item["class"] == "clock")
    assert colors[taken.color] == max(colors.values())


def test_a_color_is_the_cosine_to_the_mean_of_three_normalised_templates(detector):
    crop = picture(1).crop((0, 0, 40, 40))
    found = detector.colors(crop, "dog")
    assert list(found) == list(COLORS)
    clip, tokenizer = detector._clip, detector._tokenize
    texts = ["a photo of a pink dog", "a photo of a pink-colored dog", "a photo of a pink object"]
    with torch.no_grad():
        vectors = [clip.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0] for text in texts]
        mean = torch.stack([vector / vector.norm() for vector in vectors]).mean(0)
        pixels = detector._crop(crop, return_tensors="pt")["pixel_values"]
        image = clip.get_image_features(pixel_values=pixels).pooler_output[0]
    assert found["pink"] == pytest.approx(float(normalize(mean, dim=0) @ normalize(image, dim=0)), abs=1e-5)


def test_missing_weights_are_told_with_the_command_that_fetches_them(folders, tmp_path):
    with pytest.raises(UserError, match=r"hf download owner/nowhere` .*https://huggingface.co/owner/nowhere"):
        Detector("owner/nowhere", folders[1])
    with pytest.raises(UserError, match="--classifier"):
        Detector(folders[0], str(tmp_path))


def test_a_truncated_detector_is_named(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="--detector '.*cut': its .* cannot be loaded"):
        Detector(str(tmp_path / "cut"), folders[1])


def test_a_detector_of_other_classes_is_refused(folders, tmp_path):
    other = save_tiny_detector(tmp_path / "other", names=[f"thing {k}" for k in range(80)])
    with pytest.raises(UserError, match="not COCO's 80"):
        Detector(str(other), folders[1])
    swapped = object_names()
    swapped[0], swapped[1] = swapped[1], swapped[0]
    with pytest.raises(UserError, match="not COCO's 80"):
        Detector(str(save_tiny_detector(tmp_path / "swapped", names=swapped)), folders[1])


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_with_random_ones(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = save_tiny_clip(tmp_path / "clip")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="visual_projection"):
        Detector(folders[0], str(broken))

"""What the official packages gave, stored as golden files, is what the native rewards give: to 1e-5."""

import json
from pathlib import Path

import golden_formula
import pytest
import torch
from agsm_rl_rewards.hpsv2 import read_open_clip
from agsm_rl_rewards.image_reward import read_image_reward
from agsm_rl_rewards.preprocessing import Letterbox, ShortestSideCrop

GOLDEN = Path(__file__).parent / "golden"
HPSV2, IMAGE_REWARD = (json.loads((GOLDEN / f"{name}_tiny.json").read_text()) for name in ("hpsv2", "imagereward"))
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def test_hpsv2_scores_as_the_official_model_class(tmp_path):
    file = tmp_path / "official.pt"
    torch.save({"state_dict": golden_formula.weights(HPSV2["shapes"])}, file)
    vision, text = HPSV2["cfg"]["vision_cfg"], HPSV2["cfg"]["text_cfg"]
    sizes = {
        "vision": {
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "patch_size": vision["patch_size"],
            "image_size": vision["image_size"],
        },
        "text": {
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
        },
        "shared": {"projection_dim": HPSV2["cfg"]["embed_dim"]},
    }
    clip = read_open_clip(file, sizes, reward="hpsv2").eval()
    image = clip.get_image_features(pixel_values=golden_formula.pixels(2, 3, 28, 28)).pooler_output
    words = clip.get_text_features(input_ids=torch.tensor(HPSV2["ids"])).pooler_output
    torch.testing.assert_close(torch.cosine_similarity(image, words), torch.tensor(HPSV2["score"]), **TOLERANCE)


def test_image_reward_scores_as_the_official_model_class(tmp_path):
    file = tmp_path / "official.pt"
    torch.save(golden_formula.weights(IMAGE_REWARD["shapes"]), file)
    sizes = {
        "vision": {
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 16,
            "image_size": 32,
        },
        "text": {
            "hidden_size": 36,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "vocab_size": 120,
            "max_position_embeddings": 64,
        },
    }
    network = read_image_reward(file, sizes, reward="image_reward").eval()
    pixels, ids, mask = golden_formula.pixels(2, 3, 32, 32), torch.tensor(IMAGE_REWARD["ids"]), IMAGE_REWARD["att"]
    image = network.vision(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(image[:, 0], torch.tensor(IMAGE_REWARD["vision_cls"]), **TOLERANCE)
    torch.testing.assert_close(
        network(pixels, ids, torch.tensor(mask)), torch.tensor(IMAGE_REWARD["reward"]), **TOLERANCE
    )


def cases(golden):
    return [tuple(int(side) for side in size.split("x")) for size in golden["preprocess"]]


@pytest.mark.parametrize(("width", "height"), cases(HPSV2))
def test_hpsv2_sees_pictures_as_the_official_preprocessing_makes_them(width, height):
    expected = torch.tensor(HPSV2["preprocess"][f"{width}x{height}"])
    found = Letterbox(224).exact([golden_formula.picture(width, height)])
    torch.testing.assert_close(found.flatten()[::9001], expected, **TOLERANCE)


@pytest.mark.parametrize(("width", "height"), cases(IMAGE_REWARD))
def test_image_reward_sees_pictures_as_the_official_preprocessing_makes_them(width, height):
    expected = torch.tensor(IMAGE_REWARD["preprocess"][f"{width}x{height}"])
    found = ShortestSideCrop(224, processor=False).exact([golden_formula.picture(width, height)])
    torch.testing.assert_close(found.flatten()[::9001], expected, **TOLERANCE)

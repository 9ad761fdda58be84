"""Rendered words are read for real, by the models in RapidOCR's wheel, and scored as Flow-GRPO scores them."""

import importlib.util
import os
import socket
import sys

import pytest
import torch
from agsm_rl_rewards.ocr import OCR, edit_distance, quoted, similarity
from agsm_rl_rewards.preprocessing import to_tensor
from PIL import Image, ImageDraw, ImageFont

from agsm_rl.errors import UserError

IS_INSTALLED = importlib.util.find_spec("rapidocr") is not None
reading = pytest.mark.skipif(
    not IS_INSTALLED and os.environ.get("AGSM_RL_REQUIRE_ALL") != "1", reason="rapidocr is not installed"
)


def rendered(*lines, size=(256, 128)):
    """Black words on white, one line below the other, as an image [3, H, W]."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((16, 12 + 48 * number), line, fill="black", font=ImageFont.load_default(30))
    return to_tensor(picture)


@pytest.fixture(scope="module")
def reward():
    return OCR()


@reading
def test_words_that_are_there_score_one_and_others_less_the_more_differs(reward, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the models come with the wheel; nothing is to be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    image = rendered("Open late")
    prompts = [f'a sign that says "{text}"' for text in ("Open late", "OPEN LATE", "Open gate", "Closed now")]
    scores = reward(torch.stack([image] * 4), prompts)
    assert scores[:3].tolist() == pytest.approx([1.0, 1.0, 1 - 1 / 8])
    assert scores[3].item() == pytest.approx(similarity("Open late", "Closed now"))
    assert scores[3] < 0.3


@reading
def test_lines_are_read_from_the_top_and_more_text_around_costs_nothing(reward):
    images = torch.stack([rendered("Grand", "Opening"), rendered("Grand", "Opening")])
    prompts = ['"Grand Opening"', 'the word "opening"']
    assert reward(images, prompts).tolist() == [1.0, 1.0]


@reading
def test_colours_are_not_swapped(reward):
    picture = Image.new("RGB", (256, 96), (255, 0, 0))
    ImageDraw.Draw(picture).text((16, 20), "fire exit", fill=(255, 255, 255), font=ImageFont.load_default(36))
    assert reward(to_tensor(picture)[None], ['"fire exit"']).tolist() == [1.0]


@reading
def test_an_image_without_text_scores_zero(reward):
    blank = torch.ones(1, 3, 64, 64)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert reward(torch.cat([blank, noise]), ['"hello"'] * 2).tolist() == [0.0, 0.0]


@reading
def test_the_wanted_text_may_be_in_a_column_of_its_own(tmp_path):
    rows = [{"words": "Open late"}]
    assert OCR(column="words")(rendered("Open late")[None], ["a sign"], rows).tolist() == [1.0]
    with pytest.raises(UserError, match="column: the prompt 'a sign' has no text in 'word' .it has the columns words"):
        OCR(column="word")(rendered("Open late")[None], ["a sign"], rows)


@pytest.mark.parametrize(
    ("text", "wanted", "score"),
    [
        ("hello world", "Hello World", 1.0),
        ("xx helloworld xx", "hello world", 1.0),
        ("", "hello", 0.0),
        ("hallo", "hello", 0.8),
        ("helo", "hello", 0.8),
        ("something else altogether", "hello", 0.0),
    ],
)
def test_the_score_is_flow_grpos(text, wanted, score):
    assert similarity(text, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
)
def test_the_distance_counts_edits(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_the_first_quoted_text_is_wanted():
    assert quoted('a "red" and a "blue" sign') == "red"
    assert quoted("a sign that says “café”") == "café"
    assert quoted('a 3" nail') == quoted("nothing") == ""


@pytest.mark.parametrize("prompt", ["a sign", 'a 3" nail', 'a sign "" here', 'a sign " " here'])
def test_a_prompt_that_quotes_nothing_is_refused_before_anything_is_drawn(prompt):
    with pytest.raises(UserError, match="reward 'ocr': the prompt '.*' quotes no text; .*`column`"):
        OCR().check_prompts([prompt], [{}])


def test_a_text_that_no_picture_holds_is_refused_before_anything_is_drawn():
    with pytest.raises(UserError, match="reward 'ocr': the prompt '.*' asks for a text of 501 characters; at most 500"):
        OCR(column="words").check_prompts(["a page"], [{"words": "a b" * 250 + "c"}])


def test_without_rapidocr_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"reward 'ocr': it needs RapidOCR .*pip install 'agsm-rl\[ocr\]'"):
        OCR().check_prompts(['"hello"'], [{}])

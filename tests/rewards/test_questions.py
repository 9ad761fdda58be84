"""Questions with expected answers, asked of a real server on this machine and of a tiny model made on the spot."""

import json
import logging
import math
import re
import shutil

import pytest
import torch
from agsm_rl_rewards.answers import begins_with, is_answer
from agsm_rl_rewards.preprocessing import pictures
from agsm_rl_rewards.question_list import Question, counted, joined, questions_of
from agsm_rl_rewards.questions import Questions
from chat_serving import likely, said, serving
from tiny_vlm import save_tiny_vlm

from agsm_rl.errors import UserError
from agsm_rl.interfaces import Reward
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe

ROW = {
    "questions": [
        {"question": "Are there cats?", "category": "object"},
        {"question": "How many cats are there?", "answer": "three", "category": "count"},
    ]
}
IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.fixture
def endpoint():
    with serving() as server:
        yield server


def asking(endpoint, **options):
    return Questions(**({"url": endpoint.url, "model": "tiny-vlm", "backoff": 0.01, "timeout": 5.0} | options))


def question_in(body):
    return body["messages"][0]["content"][1]["text"]


def by_question(body):
    many = "How many" in question_in(body)
    return 200, likely(three=0.3, _3=0.2, Three=0.1, two=0.4) if many else likely(Yes=0.5, _yes=0.3, No=0.1)


def test_a_score_is_the_mean_probability_of_the_expected_answers(endpoint):
    endpoint.reply = by_question
    reward = asking(endpoint)
    assert isinstance(reward, Reward) and reward.elsewhere and reward.takes_metadata
    rows = [ROW, {"questions": ["Are there cats?"]}]
    assert reward(IMAGES, ["a", "b"], rows).tolist() == pytest.approx([(0.8 + 0.6) / 2, 0.8])
    assert len(endpoint.asked) == 3
    assert all(question_in(body).endswith("? Answer in one word.") for _, _, body, _ in endpoint.asked)


def test_the_geometric_mean_is_soft_tifas(endpoint):
    endpoint.reply = by_question
    reward = asking(endpoint, aggregate="geometric")
    assert reward(IMAGES[:1], ["a"], [ROW]).item() == pytest.approx(math.sqrt(0.8 * 0.6))


def test_an_endpoint_without_logprobs_is_scored_by_what_it_writes_and_that_is_said(endpoint, caplog):
    endpoint.reply = lambda body: (
        200,
        said(" **Three** cats." if "How" in question_in(body) else "No, there are none."),
    )
    with caplog.at_level(logging.WARNING):
        assert asking(endpoint)(IMAGES[:1], ["a"], [ROW]).item() == 0.5
    assert len([record for record in caplog.records if "gives no logprobs" in record.message]) == 1
    assert asking(endpoint, scores="hard")(IMAGES[:1], ["a"], [ROW]).item() == 0.5
    assert "logprobs" not in endpoint.asked[-1][2]
    with pytest.raises(UserError, match=r"replied without logprobs \(if it has none, use `scores: hard`\)"):
        asking(endpoint, scores="soft")(IMAGES[:1], ["a"], [ROW])


def test_soft_and_hard_scores_are_never_mixed(endpoint):
    replies = iter([likely(Yes=1.0), said("three")])
    endpoint.reply = lambda body: (200, next(replies))
    with pytest.raises(UserError, match="logprobs with some replies and not with others; set `scores`"):
        asking(endpoint, at_once=1)(IMAGES[:1], ["a"], [ROW])


def test_a_server_that_fails_stops_the_reward_and_no_key_is_shown(endpoint, monkeypatch):
    monkeypatch.setenv("QUESTIONS_KEY", "secret-123")
    endpoint.reply = lambda body: (401, {"error": "the key secret-123 is wrong"})
    with pytest.raises(UserError, match="reward 'questions': .* refused with status 401") as caught:
        asking(endpoint, api_key_env="QUESTIONS_KEY")(IMAGES, ["a", "b"], [ROW, ROW])
    assert "secret-123" not in str(caught.value)
    assert endpoint.asked[0][1]["Authorization"] == "Bearer secret-123"


def test_what_leaves_the_machine_must_be_allowed():
    assert Questions.permissions({"model": "m"}) == []
    assert Questions.permissions({"model": "m", "url": "http://127.0.0.1:8000/v1"}) == []
    options = {"model": "m", "url": "https://judge.example/v1", "api_key_env": "KEY"}
    assert Questions.permissions(options) == ["host:judge.example", "env:KEY"]


@pytest.mark.parametrize(
    ("token", "answer", "counts"),
    [
        ("Yes", "yes", True),
        (" yes", "Yes", True),
        ("▁Yes.", "yes", True),
        ("No", "yes", False),
        ("Not", "no", False),
        ("3", "three", True),
        ("three", "3", True),
        ("thr", "three", True),
        ("th", "three", False),
        ("13", "three", False),
        ("", "yes", False),
        (" ", "yes", False),
        ("cat", "cathedral", True),
        ("sevent", "seventeen", True),
        ("seven", "seventeen", False),
        ("100", "1000", False),
    ],
)
def test_a_token_counts_whatever_its_case_and_spaces(token, answer, counts):
    assert is_answer(token, Question("?", answer)) is counts


@pytest.mark.parametrize(
    ("text", "answer", "counts"),
    [
        ("Yes.", "yes", True),
        ("yesterday", "yes", False),
        ("There are 3", "three", False),
        ("3 cats", "three", True),
        ("", "no", False),
    ],
)
def test_a_written_answer_begins_with_the_expected_word(text, answer, counts):
    assert begins_with(text, Question("?", answer)) is counts


def test_what_requires_a_wrong_answer_does_not_count_nor_what_requires_that():
    questions = [Question("a"), Question("b", requires=(0,)), Question("c", requires=(1,)), Question("d")]
    assert counted([0.4, 0.9, 0.8, 0.7], questions) == [0.4, 0, 0, 0.7]
    assert counted([0.6, 0.9, 0.8, 0.7], questions) == [0.6, 0.9, 0.8, 0.7]


def test_a_wrong_answer_makes_the_geometric_mean_zero():
    assert joined([1.0, 0.0, 1.0], "geometric") == 0
    assert joined([0.5, 0.5], "geometric") == joined([0.5, 0.5], "mean") == pytest.approx(0.5)


def test_questions_may_be_json_in_a_cell():
    cell = json.dumps(ROW["questions"])
    assert questions_of({"questions": cell}, "x") == questions_of(ROW, "x")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"it has no questions \(it has no columns\).*question_files"),
        ({"tag": 1}, r"it has no questions \(it has tag\)"),
        ({"questions": []}, "it has no questions"),
        ({"questions": "["}, "'questions' is not JSON"),
        ({"questions": [3]}, "question 0: it is 3, but must be a text or a mapping"),
        ({"questions": ["a", {"answer": "yes"}]}, "question 1: its question is ''"),
        ({"questions": [{"question": "a", "answer": 3}]}, "question 0: its answer is 3"),
        ({"questions": [{"question": "a", "weight": 3}]}, "'weight' is not a key of a question"),
        ({"questions": [{"question": "a", "requires": [0]}]}, "question 0: its `requires` is .0."),
        ({"questions": ["a", {"question": "b", "requires": [0.0]}]}, "question 1: its `requires` is .0.0."),
        ({"questions": ["a", {"question": "b", "requires": [[0]]}]}, "question 1: its `requires` is ..0.."),
    ],
)
def test_a_prompt_whose_questions_cannot_be_read_is_refused(row, message):
    reward = Questions(model="nowhere")
    with pytest.raises(UserError, match=f"reward 'questions': the prompt 'a cat'.*{message}"):
        reward.check_prompts(["a cat"], [row])


def test_wrong_options_are_refused():
    with pytest.raises(UserError, match="Did you mean 'mean'"):
        Questions(model="m", aggregate="meen")
    with pytest.raises(UserError, match="scores: 'warm' is not a choice"):
        Questions(model="m", scores="warm")
    with pytest.raises(UserError, match="api_key_env: a model on this machine needs no key"):
        Questions(model="m", api_key_env="KEY")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_vlm(tmp_path_factory.mktemp("vlm")))


def test_a_local_model_gives_the_probabilities_of_the_answers_first_tokens(tiny):
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    reward = Questions(model=tiny)
    processor, model = reward._answerer._loaded
    for picture, row in zip(
        pictures(images), reward.answers(pictures(images), [questions_of(ROW, "")] * 2), strict=True
    ):
        for question, words, score in zip(ROW["questions"], (["Yes", "yes"], ["three", "3"]), row, strict=True):
            text = f"USER : <image> {question['question']} Answer in one word. ASSISTANT :"
            with torch.no_grad():
                logits = model(**processor(images=[picture], text=[text], return_tensors="pt")).logits[0, -1]
            tokens = processor.tokenizer.convert_tokens_to_ids(words)
            assert score == pytest.approx(logits.softmax(-1)[tokens].sum().item(), rel=1e-4)
    first, second = reward(images, ["a", "b"], [ROW, ROW]).tolist()
    assert first != second and not reward.elsewhere


def test_hard_scores_of_a_local_model_ask_whether_the_answer_is_likeliest(tiny):
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    reward = Questions(model=tiny, scores="hard")
    processor, model = reward._answerer._loaded
    text = "USER : <image> red ? Answer in one word. ASSISTANT :"
    with torch.no_grad():
        likeliest = model(**processor(images=pictures(images), text=[text], return_tensors="pt")).logits[0, -1].argmax()
    word = processor.tokenizer.decode([likeliest])
    rows = [
        {
            "questions": [
                {"question": "red ?", "answer": word},
                {"question": "red ?", "answer": "no" if word != "no" else "yes"},
            ]
        }
    ]
    assert reward(images, ["a"], rows).item() == 0.5


def test_a_model_that_cannot_be_loaded_is_named_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=re.escape("model '") + ".*none' cannot be loaded .*`url`"):
        Questions(model=str(tmp_path / "none")).prepare()


def test_a_truncated_model_is_named_with_what_to_do(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="model '.*cut' cannot be loaded"):
        Questions(model=str(tmp_path / "cut")).prepare()


def test_a_recipe_trains_on_answers_to_the_questions_of_its_prompts(endpoint, tiny_checkpoint, tmp_path):
    endpoint.reply = by_question
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "three cats"} | ROW))
    rewards = {"questions": {"weight": 1.0, "url": endpoint.url, "model": "tiny-vlm"}}
    rollouts = {"use": "rollouts", "prompts": str(tmp_path / "prompts.jsonl"), "rewards": rewards}
    rollouts |= {"num_prompts": 1, "images_per_prompt": 2, "num_steps": 2, "guidance": 1.0}
    recipe = {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"lora": {"use": "lora", "rank": 2}},
        "objectives": [{"use": "ddpo", "source": rollouts}],
    }
    assert build_trainer(Recipe.from_data(recipe)).run_step()["ddpo/reward/questions"] == pytest.approx(0.7)

"""Whatever a prompt's row says travels with the prompt: to rewards, views and objectives, from every kind of source."""

import datetime
import json

import datasets
import pytest
import torch
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.objectives.ddpo import DDPO
from agsm_rl.objectives.reward_backprop import RewardBackprop
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.preferences import Preferences
from agsm_rl.sources.prompt_lists import read_prompts
from agsm_rl.sources.prompts import Prompts
from agsm_rl.sources.views import BestAgainstWorst, BestImages, ChosenImages

ROWS = [
    {"prompt": f"prompt {number}", "number": number, "kind": "odd" if number % 2 else "even"} for number in range(4)
]


class OneProcess:
    index, count = 0, 1

    def gather(self, values):
        return values


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "kept"))


def written(path, rows):
    """The rows in the form that the name says."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == "":
        path.mkdir()
        (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def bound(source):
    source.bind("mine", 0, OneProcess())
    return source


def test_columns_travel_with_a_batch_of_prompts(tmp_path, policy):
    batch = bound(Prompts(written(tmp_path / "a.jsonl", ROWS), 3)).next(policy)
    expected = {row["prompt"]: {"number": row["number"], "kind": row["kind"]} for row in ROWS}
    assert batch.metadata == [expected[prompt] for prompt in batch.prompts]
    assert batch.select(torch.tensor([2, 0])).metadata == [batch.metadata[2], batch.metadata[0]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "folder"])
def test_rollouts_give_every_image_s_columns_to_rewards_and_to_views(tmp_path, policy, make_rollouts, name):
    def by_number(images, prompts, metadata):
        assert prompts == [f"prompt {row['number']}" for row in metadata]
        return [float(row["number"]) + image.mean().item() for row, image in zip(metadata, images, strict=True)]

    file = written(tmp_path / name, ROWS)
    batch = bound(make_rollouts(prompts=file, rewards=[(by_number, 1.0)], sample_batch_size=3)).next(policy)
    numbers = [int(row["number"]) for row in batch.metadata]
    assert [int(prompt.split()[1]) for prompt in batch.prompts] == numbers
    assert [round(float(reward - 0.5)) for reward in batch.rewards] == numbers
    for view in (BestImages(share=0.5, min_advantage=-9), BestAgainstWorst()):
        seen = view(batch)
        assert len(seen) and [f"prompt {row['number']}" for row in seen.metadata] == seen.prompts


def test_columns_survive_a_checkpoint_between_two_updates_of_a_draw(tmp_path, policy, make_rollouts):
    file = written(tmp_path / "a.jsonl", ROWS)
    source = bound(make_rollouts(prompts=file, updates=2))
    source.next(policy)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    again = bound(make_rollouts(prompts=file, updates=2))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.next(policy).metadata == source.next(policy).metadata is not None


def test_values_are_plain_and_pictures_are_left_out(tmp_path):
    row = {
        "prompt": "a star",
        "day": datetime.date(2026, 1, 2),
        "score": float("nan"),
        "raw": b"\x00\x01",
        "image": {"bytes": b"\x00", "path": "a.png"},
        "include": [{"class": "star", "count": 2}],
    }
    (prompt,) = read_prompts(written(tmp_path / "a.parquet", [row]))
    assert prompt.metadata == {
        "day": "2026-01-02",
        "score": None,
        "image": {"path": "a.png"},
        "include": [{"class": "star", "count": 2}],
    }


@pytest.fixture
def pictures(tmp_path):
    """Four pictures with captions and a further column, in a folder."""
    place = tmp_path / "pictures"
    place.mkdir()
    rows = []
    for row in ROWS:
        Image.new("RGB", (16, 16), (60 * row["number"], 0, 0)).save(place / f"{row['number']}.png")
        rows.append({"file_name": f"{row['number']}.png", "caption": row["prompt"], "number": row["number"]})
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(place)


@pytest.mark.parametrize("options", [{}, {"cache": "latents"}, {"streaming": True}])
def test_columns_of_a_data_set_of_images_travel_with_its_pairs(pictures, policy, options):
    batch = bound(Pairs(pictures, 4, **options)).next(policy)
    assert [f"prompt {row['number']}" for row in batch.metadata] == batch.prompts
    assert set(batch.metadata[0]) == {"number"}


def test_columns_of_preferences_travel_to_the_chosen_images(tmp_path, policy):
    picture = Image.new("RGB", (16, 16))
    columns = {
        "prompt": [row["prompt"] for row in ROWS],
        "chosen": [picture] * 4,
        "rejected": [picture] * 4,
        "number": [row["number"] for row in ROWS],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "preferences.parquet")
    chosen = ChosenImages()(bound(Preferences(str(tmp_path / "preferences.parquet"), 4)).next(policy))
    assert [f"prompt {row['number']}" for row in chosen.metadata] == chosen.prompts
    assert set(chosen.metadata[0]) == {"number"}


def test_reward_backpropagation_gives_a_reward_its_columns(tmp_path, policy):
    def aimed(images, prompts, metadata):
        wanted = torch.tensor([row["number"] / 4 for row in metadata])
        return -((images.mean((1, 2, 3)) - wanted) ** 2)

    aimed.differentiable = True
    batch = bound(Prompts(written(tmp_path / "a.jsonl", ROWS), 2)).next(policy)
    objective = RewardBackprop([(aimed, 1.0)], num_steps=1, guidance=1.0)
    loss, _ = objective.loss(policy, batch)
    images = objective.images(policy, batch).detach()
    torch.testing.assert_close(loss.detach(), -aimed(images, batch.prompts, batch.metadata).mean())


def test_a_prompt_without_what_a_reward_needs_is_refused_before_anything_is_drawn(tmp_path, make_rollouts):
    class Needing:
        name, range, differentiable, elsewhere = "needing", (0.0, 1.0), False, False

        def check_prompts(self, prompts, metadata):
            if any("target" not in row for row in metadata):
                raise UserError("reward 'needing': no target")

        def __call__(self, images, prompts):
            raise AssertionError("nothing is to be scored")

    with pytest.raises(UserError, match="reward 'needing': no target"):
        bound(make_rollouts(prompts=written(tmp_path / "a.jsonl", ROWS), rewards=[(Needing(), 1.0)]))


def test_a_negative_prompt_changes_the_draw_and_the_ratios_stay_one(policy, make_rollouts):
    def drawn(**options):
        return bound(make_rollouts(guidance=3.0, **options)).next(policy)

    plain, negative = drawn(), drawn(negative_prompt="a green square")
    assert torch.equal(plain.trajectory[:, 0], negative.trajectory[:, 0])
    assert not torch.allclose(plain.latents, negative.latents)
    _, metrics = DDPO().loss(policy, negative)
    assert metrics["ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_fraction"] == 0


def test_a_negative_prompt_without_guidance_is_refused(make_rollouts):
    with pytest.raises(UserError, match="negative_prompt: 'blurry' has no effect with `guidance: 1`"):
        make_rollouts(negative_prompt="blurry", guidance=1.0)

"""Pictures of the next batch are read while a step computes, and change nothing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from agsm_rl.sources import data_set, read_ahead
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.preferences import Preferences


class OneProcess:
    """A run of a single process."""

    index, count = 0, 1

    def gather(self, values):
        return values


@pytest.fixture
def folder(tmp_path):
    """Seven noisy pictures of several sizes, the last of which is broken, with captions and a preference each."""
    rng, rows = np.random.default_rng(0), []
    for number in range(7):
        pixels = rng.integers(0, 256, (20 + 3 * number, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "caption": f"picture number {number}"})
    (tmp_path / "6.png").write_bytes(b"no picture")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


@pytest.fixture
def ahead(monkeypatch):
    """Reads ahead as beside a GPU; collects the places that were read, and those that were taken."""
    read, taken = [], []
    monkeypatch.setattr(data_set, "pays_off", lambda device: True)
    plain_read, plain_take = read_ahead.ReadAhead._read, read_ahead.ReadAhead.take
    monkeypatch.setattr(
        read_ahead.ReadAhead, "_read", lambda self, place, size: (read.append(place), plain_read(self, place, size))[1]
    )

    def take(self, place):
        found = plain_take(self, place)
        taken.extend([place] * (found is not None))
        return found

    monkeypatch.setattr(read_ahead.ReadAhead, "take", take)
    return read, taken


def batches(folder, policy, count, **options):
    source = Pairs(str(folder), 3, **options)
    source.bind("pairs", 0, OneProcess())
    return [source.next(policy) for _ in range(count)], source


@pytest.mark.parametrize("options", [{}, {"latents": "sample"}, {"horizontal_flip": True}, {"buckets": [16, [16, 24]]}])
def test_batches_are_those_without_reading_ahead(folder, policy, options, request):
    expected, plain = batches(folder, policy, 5, **options)
    read, taken = request.getfixturevalue("ahead")
    found, source = batches(folder, policy, 5, **options)
    for one, other in zip(found, expected, strict=True):
        assert one.prompts == other.prompts
        assert torch.equal(one.latents, other.latents)
    assert source.state_dict() == plain.state_dict()
    assert source.metrics() == plain.metrics() == {"rows_skipped": plain.metrics()["rows_skipped"]}
    is_held = not options.get("latents") and not options.get("horizontal_flip")  # an epoch later, the latents are
    assert len(taken) >= (3 if is_held else 9)
    assert len(read) < (10 if is_held else 16)


def test_a_run_is_continued_where_it_was_not_where_it_had_read(folder, policy, ahead):
    _, source = batches(folder, policy, 2, latents="sample")
    state, expected = source.state_dict(), source.next(policy)
    other = Pairs(str(folder), 3, latents="sample")
    other.bind("pairs", 0, OneProcess())
    other.load_state_dict(state)
    found = other.next(policy)
    assert found.prompts == expected.prompts
    assert torch.equal(found.latents, expected.latents)


def test_both_images_of_a_preference_are_read_ahead(tmp_path, policy, ahead):
    rows = []
    for number in range(4):
        for name, level in (("good", 10 * number), ("bad", 255)):
            Image.new("RGB", (20, 16), (level, level, level)).save(tmp_path / f"{name}-{number}.png")
        files = {"chosen_file_name": f"good-{number}.png", "rejected_file_name": f"bad-{number}.png"}
        rows.append({"prompt": f"prompt {number}", **files})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Preferences(str(tmp_path), 2)
    source.bind("preferences", 0, OneProcess())
    first, second = source.next(policy), source.next(policy)
    assert len(ahead[1]) == 4
    assert sorted(first.prompts + second.prompts) == [f"prompt {number}" for number in range(4)]


def test_on_a_cpu_nothing_is_read_ahead(folder, policy):
    assert not read_ahead.pays_off(torch.device("cpu"))
    assert read_ahead.pays_off(torch.device("cuda"))
    _, source = batches(folder, policy, 2)
    assert source._data._ahead._coming == {}

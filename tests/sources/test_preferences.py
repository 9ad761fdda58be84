"""Preferences: both conventions of columns, ties, shares of processes, exact continuation, and streaming."""

import json
from io import BytesIO

import pytest
import torch
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PairBatch
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.preferences import Preferences
from agsm_rl.sources.views import ChosenImages

ROWS = 12


class FixedShard:
    """One of several processes, without any of them."""

    def __init__(self, index=0, count=1):
        self.index, self.count = index, count

    def gather(self, values):
        return values


def png(level: int) -> bytes:
    """A picture of one grey, so that its latents tell which it was."""
    file = BytesIO()
    Image.new("RGB", (16, 16), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def pick_a_pic(labels: list, **columns) -> dict:
    """Pick-a-Pic's columns: picture 0 is dark, picture 1 bright, each row a little brighter."""
    count = len(labels)
    rows = {
        "caption": [f"prompt {n}" for n in range(count)],
        "jpg_0": [png(n) for n in range(count)],
        "jpg_1": [png(255 - n) for n in range(count)],
        "label_0": [None if label is None else float(label) for label in labels],
        "are_different": [True] * count,
    }
    return rows | columns


@pytest.fixture
def write(tmp_path):
    """Write columns to a parquet file of small row groups and return its path."""
    import datasets

    def written(columns: dict, name="x.parquet") -> str:
        datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / name), batch_size=5)
        return str(tmp_path / name)

    return written


@pytest.fixture
def labelled(write):
    """Twelve rows: rows 3 and 7 are ties, row 5 has no label, the others prefer picture 1 and 0 by turns."""
    labels = [n % 2 for n in range(ROWS)]
    labels[3] = labels[7] = 0.5
    labels[5] = None
    return write(pick_a_pic(labels))


def bound(source, seed=0, shard=None):
    source.bind("preferences", seed, shard or FixedShard())
    return source


def latents_of(policy, level: int) -> torch.Tensor:
    return policy.backbone.encode_images(torch.full((1, 3, 16, 16), level / 255))[0]


def test_the_builtin_preferences_have_a_right_and_a_wrong_drawing(policy):
    batch = bound(Preferences("builtin:shapes-preferences", 4, num_pairs=8)).next(policy)
    assert batch.chosen.shape == batch.rejected.shape == (4, *policy.backbone.latent_shape)
    assert not torch.equal(batch.chosen, batch.rejected)
    assert batch.rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_label_of_one_prefers_the_first_image_and_of_zero_the_second(write, policy, streaming):
    path = write(pick_a_pic([1, 0]))
    batch = bound(Preferences(path, 2, streaming=streaming)).next(policy)
    dark, bright = batch.prompts.index("prompt 0"), batch.prompts.index("prompt 1")
    for found, level in [
        (batch.chosen[dark], 0),
        (batch.rejected[dark], 255),
        (batch.chosen[bright], 254),
        (batch.rejected[bright], 1),
    ]:
        torch.testing.assert_close(found, latents_of(policy, level), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_ties_and_rows_without_a_label_are_dropped_and_counted(labelled, policy, streaming):
    source = bound(Preferences(labelled, 3, streaming=streaming))
    seen = [prompt for _ in range(3) for prompt in source.next(policy).prompts]
    assert sorted(seen) == sorted(f"prompt {n}" for n in range(ROWS) if n not in (3, 5, 7))
    assert source.metrics() == {"ties_dropped": 3}


def test_trl_s_columns_are_read_from_a_folder_of_images(tmp_path, policy):
    rows = []
    for n in range(3):
        for name, level in (("good", 10 * n), ("bad", 255)):
            (tmp_path / f"{name}-{n}.png").write_bytes(png(level))
        rows.append(
            {"prompt": f"prompt {n}", "chosen_file_name": f"good-{n}.png", "rejected_file_name": f"bad-{n}.png"}
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = bound(Preferences(str(tmp_path), 3))
    batch = source.next(policy)
    for index, prompt in enumerate(batch.prompts):
        expected = latents_of(policy, 10 * int(prompt.split()[1]))
        torch.testing.assert_close(batch.chosen[index], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.rejected[index], latents_of(policy, 255), rtol=1e-4, atol=1e-5)
    assert source.metrics() == {}


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_share_the_batch_that_one_process_would_take(labelled, policy, streaming):
    def drawn(shard):
        source = bound(Preferences(labelled, 4, streaming=streaming, shuffle_buffer=5), shard=shard)
        return [source.next(policy) for _ in range(4)]

    shares = zip(drawn(FixedShard(0, 2)), drawn(FixedShard(1, 2)), strict=True)
    for whole, parts in zip(drawn(FixedShard()), shares, strict=True):
        assert whole.prompts == parts[0].prompts + parts[1].prompts
        assert torch.equal(whole.rows, torch.cat([part.rows for part in parts]))
        torch.testing.assert_close(whole.chosen, torch.cat([part.chosen for part in parts]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"streaming": True, "shuffle_buffer": 5}, {"streaming": True}])
def test_continuing_at_any_batch_gives_the_batches_that_would_have_come(labelled, policy, options, tmp_path):
    """Batches of 2 over 9 rows, through two epochs: stops fall within windows, at their borders and at epochs' ends."""
    whole = bound(Preferences(labelled, 2, **options))
    states, expected = [], []
    for _ in range(10):
        states.append(whole.state_dict())
        expected.append((whole.next(policy).prompts, whole.metrics()))
    for stop, state in enumerate(states):
        torch.save(state, tmp_path / "state.pt")
        again = bound(Preferences(labelled, 2, **options))
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert [(again.next(policy).prompts, again.metrics()) for _ in range(10 - stop)] == expected[stop:]


def test_a_state_survives_being_loaded_and_taken_again_before_the_next_batch(labelled, policy):
    source = bound(Preferences(labelled, 2, streaming=True, shuffle_buffer=4))
    source.next(policy), source.next(policy), source.next(policy)
    state, expected = source.state_dict(), source.next(policy).prompts
    for _ in range(2):
        other = bound(Preferences(labelled, 2, streaming=True, shuffle_buffer=4))
        other.load_state_dict(state)
        state = other.state_dict()
    assert other.next(policy).prompts == expected


def test_a_stream_gives_every_row_once_an_epoch_in_another_order_each_time(write, policy):
    path = write(pick_a_pic([1] * ROWS))

    def epochs(**options):
        source = bound(Preferences(path, 4, streaming=True, **options))
        return [[prompt for _ in range(3) for prompt in source.next(policy).prompts] for _ in range(2)]

    in_order = [f"prompt {n}" for n in range(ROWS)]
    first, second = epochs()
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert in_order != first != second
    assert epochs(shuffle_buffer=1) == [in_order, in_order]


def test_a_stream_is_limited_to_its_first_rows(write, policy):
    source = bound(Preferences(write(pick_a_pic([1] * ROWS)), 3, num_pairs=6, streaming=True))
    seen = {prompt for _ in range(4) for prompt in source.next(policy).prompts}
    assert seen == {f"prompt {n}" for n in range(6)}


def test_pairs_stream_with_captions_that_differ_within_a_batch(write, policy):
    captions = [f"picture {n // 2}" for n in range(ROWS)]
    path = write({"image": [png(n) for n in range(ROWS)], "caption": captions})
    source = bound(Pairs(path, 3, streaming=True, shuffle_buffer=4))
    batches = [source.next(policy) for _ in range(3)]
    assert all(len(set(batch.prompts)) == 3 for batch in batches)
    state, expected = source.state_dict(), source.next(policy).prompts
    again = bound(Pairs(path, 3, streaming=True, shuffle_buffer=4))
    again.load_state_dict(state)
    assert again.next(policy).prompts == expected


def test_a_stream_of_one_caption_fills_a_batch_all_the_same(write, policy):
    path = write({"image": [png(n) for n in range(4)], "caption": ["the same"] * 4})
    assert bound(Pairs(path, 3, streaming=True)).next(policy).prompts == ["the same"] * 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpg_1": [png(n) for n in range(3)] + [b"no picture"]}, "row 3, column 'jpg_1': its image cannot be read"),
        ({"jpg_0": [png(0), None, png(2), png(3)]}, "row 1, column 'jpg_0': its image cannot be read (it holds None"),
        ({"caption": ["a", "b", "", "d"]}, "row 2: column 'caption' holds ''"),
    ],
)
def test_a_broken_row_is_named_counted_and_passed_over(write, policy, caplog, change, message, streaming):
    path = write(pick_a_pic([1, 0, 1, 0]) | change)
    source = bound(Preferences(path, 4, streaming=streaming))
    batch = source.next(policy)
    assert message in caplog.text
    assert source.metrics() == {"ties_dropped": 0.0, "rows_skipped": 1.0}
    assert (len(batch), len(set(batch.prompts))) == (4, 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_label_that_means_nothing_is_refused(write, policy, streaming):
    path = write(pick_a_pic([1.0, 0.0, 0.7, 1.0]))
    with pytest.raises(UserError, match="row 2: column 'label_0' holds 0.7.*0.5 .a tie"):
        bound(Preferences(path, 4, streaming=streaming)).next(policy)


def test_row_numbers_in_messages_count_the_ties_that_were_dropped(write, policy):
    path = write(pick_a_pic([0.5, 0.5, 1], caption=["a", "b", ""]))
    with pytest.raises(UserError, match="row 2: column 'caption'"):
        bound(Preferences(path, 1)).next(policy)


def test_columns_of_neither_convention_are_refused_with_both(write):
    path = write({"prompt": ["a"], "image": [png(0)]})
    with pytest.raises(UserError, match="it has: prompt, image. Name them prompt, chosen, rejected .*label_0"):
        bound(Preferences(path, 1))


def test_too_few_rows_are_told_with_the_ties(labelled):
    with pytest.raises(UserError, match=r"9 rows that are not ties \(3 are\), fewer than batch_size 10"):
        bound(Preferences(labelled, 10))


def test_a_stream_of_nothing_but_ties_is_refused_rather_than_read_for_ever(write, policy):
    source = bound(Preferences(write(pick_a_pic([0.5, 0.5])), 1, streaming=True))
    with pytest.raises(UserError, match="no usable rows"):
        source.next(policy)


@pytest.mark.parametrize(("streaming", "other"), [(False, True), (True, False)])
def test_a_streamed_run_is_not_continued_from_one_that_was_not(labelled, streaming, other):
    state = bound(Preferences(labelled, 2, streaming=streaming)).state_dict()
    with pytest.raises(UserError, match="checkpoint: .*streamed"):
        bound(Preferences(labelled, 2, streaming=other)).load_state_dict(state)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_pairs": 0}, {"shuffle_buffer": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Preferences("builtin:shapes-preferences", **options)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size 3 is the total .* cannot be divided among the 2"):
        bound(Preferences("builtin:shapes-preferences", 3), shard=FixedShard(0, 2))


def test_an_unknown_builtin_is_refused_with_those_there_are():
    with pytest.raises(
        UserError,
        match="not a builtin data set of this source; allowed: builtin:scenes-preferences, builtin:shapes-preferences",
    ):
        bound(Preferences("builtin:shapes", 2))


def test_the_chosen_images_are_pairs_that_other_objectives_learn_from(labelled, policy):
    batch = bound(Preferences(labelled, 3)).next(policy)
    pairs = ChosenImages()(batch)
    assert isinstance(pairs, PairBatch)
    assert pairs.prompts == batch.prompts
    assert torch.equal(pairs.rows, batch.rows)
    assert torch.equal(pairs.latents, batch.chosen)
    assert ChosenImages().batch_size(8) == 8

"""Pairs: order, shares of processes, resizing, and messages about broken data sets."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from agsm_rl.errors import UserError
from agsm_rl.sources import data_set
from agsm_rl.sources.latents import fit
from agsm_rl.sources.order import Order
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.pictures import read_picture


class FixedShard:
    """One of several processes, without any of them."""

    def __init__(self, index=0, count=1):
        self.index, self.count = index, count

    def gather(self, values):
        return values


@pytest.fixture
def folder(tmp_path):
    """Six pictures of several sizes and modes with captions."""
    rows = []
    for index, (mode, size) in enumerate(
        [("RGB", (40, 20)), ("L", (16, 16)), ("RGBA", (17, 33)), ("P", (50, 50)), ("RGB", (8, 8)), ("CMYK", (20, 20))]
    ):
        name = f"{index}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, size, 90 if mode in ("L", "P") else None).save(tmp_path / name)
        rows.append({"file_name": name, "caption": f"picture number {index}"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def bound(source, seed=0, shard=None):
    source.bind("pairs", seed, shard or FixedShard())
    return source


def test_pictures_of_any_size_and_mode_become_latents_of_the_backbone(folder, policy):
    batch = bound(Pairs(str(folder), 6)).next(policy)
    assert batch.latents.shape == (6, *policy.backbone.latent_shape)
    assert sorted(batch.prompts) == [f"picture number {index}" for index in range(6)]


def test_every_image_is_seen_once_an_epoch_in_another_order(folder, policy):
    source = bound(Pairs(str(folder), 3))
    epochs = [source.next(policy).prompts + source.next(policy).prompts for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_processes_share_the_batch_that_one_process_would_take(folder, policy):
    whole = bound(Pairs(str(folder), 4)).next(policy)
    parts = [bound(Pairs(str(folder), 4), shard=FixedShard(index, 2)).next(policy) for index in range(2)]
    assert whole.prompts == parts[0].prompts + parts[1].prompts
    assert torch.equal(whole.rows, torch.cat([part.rows for part in parts]))
    torch.testing.assert_close(whole.latents, torch.cat([part.latents for part in parts]), rtol=1e-4, atol=1e-5)


def test_a_loaded_state_continues_with_the_next_batch(folder, policy):
    source = bound(Pairs(str(folder), 2))
    source.next(policy)
    state, expected = source.state_dict(), source.next(policy).prompts
    other = bound(Pairs(str(folder), 2))
    other.load_state_dict(state)
    assert other.next(policy).prompts == expected


def test_captions_of_a_batch_differ_where_the_data_set_allows_it():
    captions = ["a", "a", "a", "b", "c", "a"]
    for seed in range(5):
        rows = Order(6, seed, "pairs").take(3, key=lambda row: captions[row])
        assert len({captions[row] for row in rows}) == 3
    assert len(Order(2, 0, "pairs").take(4, key=lambda row: "same")) == 4


def test_fitting_keeps_the_centre_and_the_proportions():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    fitted = fit(Image.fromarray(picture), 10)
    assert fitted.shape == (3, 10, 10)
    assert fitted[:, :, 2:8].min() > 0.95


def test_a_strip_of_pixels_is_fitted_without_being_enlarged_as_a_whole():
    assert fit(Image.new("RGB", (1, 40_000), "white"), 512).min() == 1


def test_greys_of_sixteen_bits_keep_their_shades():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    file = BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    found = np.array(read_picture(file.getvalue(), "row 0"))
    assert found.shape == (4, 256, 3)
    assert np.abs(found[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    with pytest.raises(UserError, match="row 0: .*mode F, whose range is not known"):
        read_picture(Image.new("F", (4, 4)), "row 0")


def test_a_picture_stands_upright_however_its_bytes_are_kept():
    file = BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    for value in (file.getvalue(), {"bytes": file.getvalue(), "path": None}):
        assert read_picture(value, "row 0").size == (10, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "0.png").write_bytes(b"no picture"), "row 0: its image cannot be read"),
        (lambda path: rewrite(path, caption=""), "row 2: column 'caption' holds ''"),
        (lambda path: rewrite(path, caption=None), "row 2: column 'caption' holds None"),
    ],
)
def test_a_broken_row_is_named_counted_and_passed_over_for_the_next_one(folder, policy, caplog, change, message):
    good = bound(Pairs(str(folder), 6)).next(policy)
    change(folder)
    source = bound(Pairs(str(folder), 6))
    batch = source.next(policy)
    (warning,) = caplog.messages
    assert message in warning
    assert source.metrics() == {"rows_skipped": 1.0}
    number = int(message.split()[1][:-1])
    bad, following = (
        [at for at, caption in enumerate(good.prompts) if caption.endswith(str(n))][0] for n in (number, number + 1)
    )
    assert batch.prompts[bad] == batch.prompts[following] == good.prompts[following]
    assert torch.equal(batch.latents[bad], batch.latents[following])
    other = bound(Pairs(str(folder), 6))
    other.load_state_dict(source.state_dict())
    assert other.metrics() == source.metrics()


def test_a_data_set_with_nothing_but_broken_rows_is_refused(folder, policy):
    for path in folder.glob("[0-9].*"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="consecutive rows cannot be read; the first: .*row"):
        bound(Pairs(str(folder), 6)).next(policy)


def test_a_stream_passes_over_a_broken_row_in_the_same_way_each_time(folder, policy):
    (folder / "3.png").write_bytes(b"no picture")
    options = {"streaming": True, "shuffle_buffer": 6}
    batches = [bound(Pairs(str(folder), 6, **options)).next(policy) for _ in range(2)]
    assert batches[0].prompts == batches[1].prompts
    assert len(set(batches[0].prompts)) == 5


def rewrite(path, **values):
    rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    rows[2] |= values
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7}, "it has 6 rows, fewer than batch_size 7"),
        ({"caption_column": "words"}, "no column 'words'; it has: image, caption"),
        ({"image_column": "photo"}, "no column 'photo'; it has: image, caption"),
        ({"split": "test"}, "split: 'test' is not a split of it; allowed: train"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused_with_what_it_has(folder, options, message):
    with pytest.raises(UserError, match=message):
        bound(Pairs(str(folder), **({"batch_size": 2} | options)))


def test_a_folder_without_captions_says_how_to_give_them(folder):
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="6 images but no captions; .*metadata.jsonl .*1.txt beside 1.png"):
        bound(Pairs(str(folder), 2))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        bound(Pairs(str(tmp_path / "nothing"), 2))


def test_a_parquet_file_is_read(folder, tmp_path, policy):
    import datasets

    datasets.load_dataset("imagefolder", data_dir=str(folder), split="train").to_parquet(str(tmp_path / "x.parquet"))
    assert len(bound(Pairs(str(tmp_path / "x.parquet"), 4)).next(policy)) == 4


def test_of_several_captions_the_first_or_a_random_one_is_taken_and_a_resumed_run_takes_the_same(tmp_path, policy):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    captions = [["a", "b", "c"], ["d", "e", "f"]]
    rows = [{"file_name": f"{number}.png", "caption": texts} for number, texts in enumerate(captions)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    first = bound(Pairs(str(tmp_path), 2))
    assert all(sorted(first.next(policy).prompts) == ["a", "d"] for _ in range(3))
    assert sorted(first.prompt_texts()) == list("abcdef")
    source = bound(Pairs(str(tmp_path), 2, caption="random"))
    seen = [source.next(policy).prompts for _ in range(4)]
    state = source.state_dict()
    following = [source.next(policy).prompts for _ in range(8)]
    assert {text for prompts in seen + following for text in prompts} == set("abcdef")
    resumed = bound(Pairs(str(tmp_path), 2, caption="random"))
    resumed.load_state_dict(state)
    assert [resumed.next(policy).prompts for _ in range(8)] == following
    parts = [bound(Pairs(str(tmp_path), 2, caption="random"), shard=FixedShard(index, 2)) for index in range(2)]
    assert [parts[0].next(policy).prompts + parts[1].next(policy).prompts for _ in range(4)] == seen
    with pytest.raises(UserError, match="caption: 'last' is not"):
        Pairs(str(tmp_path), 2, caption="last")


def test_a_sample_of_the_posterior_is_new_each_time_and_the_same_in_each_run(policy, make_pairs):
    def drawn(**options):
        source = make_pairs(batch_size=24, **options)
        source.bind("pairs", 0, FixedShard())
        return [source.next(policy).latents for _ in range(2)]

    mode, sample, again = drawn(), drawn(latents="sample"), drawn(latents="sample")
    assert torch.equal(sample[0], again[0]) and torch.equal(sample[1], again[1])
    apart = [taken - mean for taken, mean in zip(sample, mode, strict=True)]
    assert apart[0].abs().min() > 0 and not torch.allclose(apart[0], apart[1])


def test_a_share_of_captions_is_replaced_by_the_empty_prompt(policy, make_pairs):
    source = make_pairs(batch_size=24, caption_dropout=0.5)
    source.bind("pairs", 0, FixedShard())
    batches = [source.next(policy).prompts for _ in range(2)]
    empty = [[prompt == "" for prompt in prompts] for prompts in batches]
    assert all(0 < sum(row) < 24 for row in empty) and empty[0] != empty[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": "sample", "cache": "latents"}, "leave one of them out"),
        ({"latents": "smaple"}, "Did you mean 'sample'"),
        ({"caption_dropout": 1.0}, r"must lie in \[0, 1\)"),
        ({"caption_dropout": 0.1, "cache": "all"}, "write `cache: latents`"),
    ],
)
def test_options_of_latents_and_captions_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Pairs("builtin:shapes", **options)


def test_later_epochs_neither_read_nor_encode_images_and_have_the_same_latents(policy, make_pairs, monkeypatch):
    held, anew = bound(make_pairs(num_images=6)), bound(make_pairs(num_images=6))
    anew._data.held = None
    for _ in range(3):  # two epochs of 6 rows, four at a time: one batch is half new
        one, other = held.next(policy).latents, anew.next(policy).latents
        assert torch.equal(one, other) and one.stride() == other.stride()  # another layout is rounded otherwise
    monkeypatch.setattr(policy.backbone, "encode_images", None)
    monkeypatch.setattr(data_set, "read_picture", None)
    assert held.next(policy).latents.shape == (4, *policy.backbone.latent_shape)


def test_latents_that_change_each_time_are_not_held(make_pairs):
    assert make_pairs(horizontal_flip=True)._data.held is None
    assert make_pairs(latents="sample")._data.held is None
    assert make_pairs(streaming=True)._data.held is None


def test_another_backbone_encodes_the_images_itself(make_policy, make_pairs, monkeypatch):
    source, other = bound(make_pairs(num_images=4)), make_policy()
    source.next(make_policy())
    encode, encoded = other.backbone.encode_images, []
    monkeypatch.setattr(
        other.backbone, "encode_images", lambda images: (encoded.append(len(images)), encode(images))[1]
    )
    source.next(other)
    assert encoded == [4]

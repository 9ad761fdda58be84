"""Aspect buckets: which sizes there are, where a picture goes, how it is cut, and the order of the batches."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.sources.bucket_order import BucketOrder
from agsm_rl.sources.buckets import assign, automatic_buckets, check_buckets, crop_of
from agsm_rl.sources.latents import fit
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.preferences import Preferences
from agsm_rl.training.sizes import Size, parse_resolution

WIDE, TALL, SQUARE = Size(768, 1344), Size(1344, 768), Size(1024, 1024)


def test_automatic_buckets_are_those_that_sdxl_is_usually_trained_on():
    buckets = automatic_buckets(SQUARE, 8)
    for usual in (SQUARE, WIDE, TALL, (832, 1216), (896, 1152), (960, 1088), (640, 1536), (512, 2048), (2048, 512)):
        assert usual in buckets
    assert all(height * width <= 1024**2 and not height % 64 and not width % 64 for height, width in buckets)
    assert all((size.width, size.height) in buckets and 512 <= size.height <= 2048 for size in buckets)


@pytest.mark.parametrize(
    ("picture", "bucket"),
    [
        ((1000, 1000), SQUARE),
        ((900, 1600), WIDE),  # 16 : 9
        ((4000, 2200), TALL),
        ((500, 500), Size(512, 512)),  # blown up less than to 1024 x 1024
        ((5000, 5000), SQUARE),  # both squares keep all of it: the larger one
        ((300, 9000), WIDE),  # a strip: the widest
    ],
)
def test_a_picture_goes_to_the_bucket_that_loses_least_of_it(picture, bucket):
    buckets = [Size(512, 512), WIDE, TALL, SQUARE]
    assert buckets[assign(np.array([[picture]]), buckets, batch_size=1)[0]] == bucket


def test_two_images_of_a_pair_share_the_bucket_that_is_best_for_both():
    pair = np.array([[(1344, 768), (1000, 1010)]])  # a tall one alone would go elsewhere
    buckets = [Size(1536, 640), Size(1152, 896), WIDE]
    assert buckets[assign(pair, buckets, batch_size=1)[0]] == (1152, 896)


def test_buckets_with_too_few_pictures_for_a_batch_are_given_up():
    pictures = np.array([[(1000, 1000)]] * 4 + [[(768, 1344)]] * 3 + [[(640, 1536)]] + [[(0, 0)]])
    buckets = [WIDE, SQUARE, Size(640, 1536)]
    assert assign(pictures, buckets, batch_size=4).tolist() == [1] * 4 + [0] * 4 + [1]  # the unreadable one: to most
    ties = np.array([False] * 4 + [True] * 5)  # rows that are never drawn fill no batch
    assert assign(pictures, buckets, batch_size=4, usable=ties).tolist()[4:8] == [0] * 4
    assert set(assign(pictures, buckets, batch_size=9).tolist()) == {1}


def test_a_picture_is_cut_in_the_centre_and_its_crop_says_where():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))  # width 200, height 100
    cut = fit(Image.fromarray(np.ascontiguousarray(ramp)), (50, 50))
    assert cut.shape == (3, 50, 50)
    assert cut[0, 0, 0].item() * 255 == pytest.approx(50.5, abs=1)  # columns 50 to 150 are left
    assert crop_of(Size(100, 200), Size(50, 50)) == (100, 200, 0, 25)
    assert crop_of(Size(1500, 1000), Size(1152, 896)) == (1500, 1000, 96, 0)
    assert fit(Image.fromarray(np.ascontiguousarray(ramp)), (64, 128)).shape == (3, 64, 128)


BUCKET_OF = [0] * 7 + [1] * 5 + [2] * 2


def taken(order: BucketOrder, count: int, *, batch_size: int) -> list[list[int]]:
    return [order.take(batch_size) for _ in range(count)]


def test_each_batch_is_of_one_bucket_and_each_row_comes_equally_often():
    batches = taken(BucketOrder(BUCKET_OF, seed=0, name="x"), 70, batch_size=2)
    assert all(len({BUCKET_OF[row] for row in batch}) == 1 for batch in batches)
    counts = Counter(row for batch in batches for row in batch)
    assert sorted(counts) == list(range(len(BUCKET_OF)))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_order_continues_exactly_where_its_state_was_taken():
    whole = taken(BucketOrder(BUCKET_OF, seed=5, name="x"), 12, batch_size=3)
    first, second = (BucketOrder(BUCKET_OF, seed=5, name="x") for _ in range(2))
    begun = taken(first, 5, batch_size=3)
    second.load_state_dict(first.state_dict())
    assert begun + taken(second, 7, batch_size=3) == whole
    with pytest.raises(UserError, match="other `buckets`"):
        second.load_state_dict({"position": 3})
    with pytest.raises(UserError, match="other `buckets`"):
        second.load_state_dict({"position": 3, "waiting": [[7], [], []]})  # row 7 is of the second bucket now


def test_captions_of_a_batch_differ_where_the_bucket_allows_it():
    captions = ["a", "a", "b", "c", "c", "d", "e", *"xxxxx", *"yz"]
    order = BucketOrder(BUCKET_OF, seed=1, name="x")
    batches = [order.take(2, lambda row: captions[row]) for _ in range(40)]
    for batch in batches:
        same = len({captions[row] for row in batch}) == 1
        assert same == (BUCKET_OF[batch[0]] == 1)  # that bucket has one caption only


def test_sizes_are_read_and_refused_with_what_is_allowed():
    assert check_buckets([512, [768, 1344]]) == (Size(512, 512), WIDE)
    assert parse_resolution("768,1344", where="--resolution") == (768, 1344)
    assert parse_resolution("512", where="--resolution") == 512
    for wrong, message in {
        "1344x768": "HEIGHT,WIDTH",
        "0": "positive",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_resolution(wrong, where="--resolution")
    for wrong, message in {"some": "auto", (): "auto", (512, 512): "twice", ((1, 2, 3),): r"\[height, width\]"}.items():
        with pytest.raises(UserError, match=message):
            check_buckets(wrong)


def test_the_square_of_a_picture_is_cut_to_the_pixel_as_ever():
    numbers = torch.Generator().manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 255, (57, 91, 3), generator=numbers).byte().numpy())
    square = picture.resize((32, 32), Image.Resampling.BICUBIC, box=(17.0, 0.0, 74.0, 57.0))
    assert torch.equal(fit(picture, 32), torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255)


class FixedShard:
    """One of several processes, without any of them."""

    def __init__(self, index=0, count=1):
        self.index, self.count = index, count

    def gather(self, values):
        return values


SHAPES = {"wide": (48, 24), "tall": (24, 48), "square": (40, 40)}


@pytest.fixture
def folder(tmp_path):
    """Four pictures of each of three shapes, one of them lying on its side."""
    rows = []
    for kind, size in SHAPES.items():
        for index in range(4):
            name = f"{kind}-{index}.jpg"
            picture, exif = Image.new("RGB", size, (40 * index + 50,) * 3), Image.Exif()
            if (kind, index) == ("tall", 0):
                picture, exif[0x0112] = picture.rotate(90, expand=True), 6
            picture.save(tmp_path / name, exif=exif)
            rows.append({"file_name": name, "caption": f"{kind} picture {index}"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


BUCKETS = [[8, 16], [16, 8], 16]


def bound(source, backbone, shard=None):
    source.bind("pairs", 0, shard or FixedShard())
    source.fit_to(backbone)
    return source


@pytest.mark.parametrize("cache", [None, "latents"])
def test_a_batch_of_a_folder_is_of_one_shape_and_knows_its_crops(folder, policy, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "cache"))
    source = bound(Pairs(str(folder), 4, buckets=BUCKETS, cache=cache), policy.backbone)
    latents = policy.backbone.latent_shape[1] / policy.backbone.resolution
    for _ in range(6):
        batch = source.next(policy)
        (kind,) = {prompt.split()[0] for prompt in batch.prompts}
        width, height = SHAPES[kind]
        expected = {"wide": (8, 16), "tall": (16, 8), "square": (16, 16)}[kind]
        assert batch.latents.shape[2:] == tuple(int(side * latents) for side in expected)
        assert batch.crops.tolist() == [[height, width, 0, 0]] * 4


def test_processes_share_a_bucketed_batch_and_a_resumed_one_goes_on(folder, policy):
    def source(index=0, count=1):
        return bound(Pairs(str(folder), 4, buckets=BUCKETS), policy.backbone, FixedShard(index, count))

    whole, halves = source(), [source(0, 2), source(1, 2)]
    prompts = [whole.next(policy).prompts for _ in range(5)]
    assert [sum((half.next(policy).prompts for half in halves), []) for _ in range(5)] == prompts
    state, following = whole.state_dict(), whole.next(policy)
    resumed = source()
    resumed.load_state_dict(state)
    again = resumed.next(policy)
    assert again.prompts == following.prompts and torch.equal(again.latents, following.latents)


def test_an_unreadable_picture_is_replaced_by_one_of_its_bucket(folder, policy):
    (folder / "wide-1.jpg").write_bytes((folder / "wide-1.jpg").read_bytes()[:200])
    source = bound(Pairs(str(folder), 3, buckets=BUCKETS), policy.backbone)
    prompts = [source.next(policy).prompts for _ in range(12)]
    assert all(len({prompt.split()[0] for prompt in batch}) == 1 for batch in prompts)
    assert "wide picture 1" not in sum(prompts, []) and source.metrics()["rows_skipped"] > 0


def test_both_images_of_a_preference_are_of_one_shape(folder, policy):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": first["caption"], "chosen_file_name": first["file_name"], "rejected_file_name": second["file_name"]}
        for first, second in zip(rows, rows[4:] + rows[:4], strict=True)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    batch = bound(Preferences(str(folder), 4, buckets=BUCKETS), policy.backbone).next(policy)
    assert batch.chosen.shape == batch.rejected.shape
    assert batch.chosen_crops.shape == batch.rejected_crops.shape == (4, 4)
    assert not torch.equal(batch.chosen_crops, batch.rejected_crops)


def test_sizes_that_a_backbone_cannot_draw_are_refused(folder, policy):
    with pytest.raises(UserError, match=r"pairs: buckets\[1\]: got 15; a positive multiple of 8 is needed"):
        bound(Pairs(str(folder), 4, buckets=[16, 15]), policy.backbone)
    with pytest.raises(UserError, match="streaming"):
        Pairs(str(folder), 4, buckets="auto", streaming=True)

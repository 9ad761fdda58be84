"""Captions left out, mirror images and samples of latents, of pairs and of preferences alike."""

from io import BytesIO

import pytest
import torch
from PIL import Image

from agsm_rl.errors import UserError
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.preferences import Preferences

ROWS = 24


class FixedShard:
    """One of several processes, without any of them."""

    def __init__(self, index=0, count=1):
        self.index, self.count = index, count

    def gather(self, values):
        return values


def half_dark(level: int) -> bytes:
    """A picture that is black on the left, so that its latents tell which way round it was."""
    picture, file = Image.new("RGB", (16, 16), (level,) * 3), BytesIO()
    picture.paste((0, 0, 0), (0, 0, 8, 16))
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make(tmp_path):
    """A source of either kind over the same pictures; a whole epoch a batch."""
    import datasets

    columns = {
        "caption": [f"prompt {row}" for row in range(ROWS)],
        "jpg_0": [half_dark(120 + row) for row in range(ROWS)],
        "jpg_1": [half_dark(220 - row) for row in range(ROWS)],
        "label_0": [1.0] * ROWS,
    }
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "preferences.parquet"))
    images = {"image": columns["jpg_0"], "caption": columns["caption"]}
    datasets.Dataset.from_dict(images).to_parquet(str(tmp_path / "pairs.parquet"))

    def made(kind, *, shard=None, batch_size=ROWS, **options):
        path = str(tmp_path / f"{'pairs' if kind is Pairs else 'preferences'}.parquet")
        source = kind(path, batch_size, **options)
        source.bind("own", 0, shard or FixedShard())
        return source

    return made


def latents(batch):
    """All images' latents of a batch, the chosen ones first."""
    return torch.cat([batch.chosen, batch.rejected]) if hasattr(batch, "chosen") else batch.latents


KINDS = pytest.mark.parametrize("kind", [Pairs, Preferences], ids=["pairs", "preferences"])


@KINDS
def test_about_half_of_the_images_are_mirrored_others_each_time(make, policy, kind):
    plain, source = make(kind).next(policy), make(kind, horizontal_flip=True)
    batches = [source.next(policy) for _ in range(2)]
    seen = []
    for batch in batches:
        order = [batch.prompts.index(prompt) for prompt in plain.prompts]
        found = latents(batch).unflatten(0, (-1, ROWS))[:, order].flatten(0, 1)
        same = (found - latents(plain)).abs().flatten(1).amax(dim=1) < 1e-4
        assert ROWS / 4 < int((~same).sum()) / (len(same) / ROWS) < 3 * ROWS / 4
        seen.append(same)
    assert not torch.equal(*seen)


def test_the_two_images_of_a_preference_are_mirrored_each_by_itself(make, policy):
    plain, batch = make(Preferences).next(policy), make(Preferences, horizontal_flip=True).next(policy)
    assert plain.prompts == batch.prompts
    chosen, rejected = (
        (one - other).abs().flatten(1).amax(dim=1) < 1e-4
        for one, other in ((batch.chosen, plain.chosen), (batch.rejected, plain.rejected))
    )
    assert len({(bool(one), bool(other)) for one, other in zip(chosen, rejected, strict=True)}) == 4


def test_a_mirrored_image_has_the_latents_of_its_mirror_image(make, policy):
    batch = make(Pairs, horizontal_flip=True).next(policy)
    row = batch.prompts.index("prompt 7")
    picture = Image.open(BytesIO(half_dark(127)))
    pixels = [torch.tensor(list(one.getdata())).reshape(16, 16, 3) for one in (picture, picture.transpose(0))]
    ways = [policy.backbone.encode_images(one.permute(2, 0, 1)[None] / 255)[0] for one in pixels]
    assert not torch.allclose(*ways, atol=1e-3)
    assert any(torch.allclose(batch.latents[row], way, atol=1e-4) for way in ways)


@KINDS
def test_samples_are_new_each_time_and_of_each_image(make, policy, kind):
    mode, source, again = make(kind).next(policy), make(kind, latents="sample"), make(kind, latents="sample")
    first, second = source.next(policy), source.next(policy)
    assert torch.equal(latents(first), latents(again.next(policy)))
    apart = latents(first) - latents(mode)
    assert apart.abs().min() > 0
    order = [second.prompts.index(prompt) for prompt in first.prompts]
    assert not torch.allclose(latents(second).unflatten(0, (-1, ROWS))[:, order].flatten(0, 1), latents(first))
    if kind is Preferences:
        assert not torch.allclose(apart[:ROWS], apart[ROWS:])


@KINDS
def test_a_share_of_prompts_is_empty(make, policy, kind):
    source = make(kind, caption_dropout=0.5)
    empty = [[prompt == "" for prompt in source.next(policy).prompts] for _ in range(2)]
    assert all(0 < sum(row) < ROWS for row in empty) and empty[0] != empty[1]


@KINDS
def test_a_resumed_source_and_two_processes_draw_what_one_run_draws(make, policy, kind):
    options = {"batch_size": 4, "caption_dropout": 0.4, "latents": "sample", "horizontal_flip": True}
    source = make(kind, **options)
    source.next(policy)
    state = source.state_dict()
    expected = source.next(policy)
    resumed = make(kind, **options)
    resumed.load_state_dict(state)
    found = resumed.next(policy)
    assert found.prompts == expected.prompts and torch.equal(latents(found), latents(expected))
    shares = [make(kind, shard=FixedShard(index, 2), **options) for index in range(2)]
    for part in shares:
        part.load_state_dict(state)
    parts = [part.next(policy) for part in shares]
    assert [prompt for part in parts for prompt in part.prompts] == expected.prompts
    rows = torch.cat([latents(part).unflatten(0, (-1, 2)) for part in parts], dim=1).flatten(0, 1)
    torch.testing.assert_close(rows, latents(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": "sample", "cache": "latents"}, "leave one of them out"),
        ({"horizontal_flip": True, "cache": "latents"}, "cache: keeps no mirror images"),
        ({"latents": "smaple"}, "Did you mean 'sample'"),
        ({"caption_dropout": 1.0}, r"must lie in \[0, 1\)"),
        ({"caption_dropout": 0.1, "cache": "all"}, "write `cache: latents`"),
    ],
    ids=str,
)
@KINDS
def test_what_cannot_be_is_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind("builtin:shapes", **options)

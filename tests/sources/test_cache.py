"""The encoding cache: the same run with it as without it, each thing encoded once, and never the wrong one used."""

import json
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.errors import UserError
from agsm_rl.objectives.agsm import AGSM
from agsm_rl.objectives.diffusion_dpo import DiffusionDPO
from agsm_rl.objectives.score_matching import ScoreMatching
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.sources.cache import cache_folder, pack, unpack
from agsm_rl.sources.pairs import Pairs
from agsm_rl.sources.preferences import Preferences
from agsm_rl.trainer import Term, Trainer

BF16 = 2**-8
"""The largest relative error of rounding to bfloat16."""


class OneProcess:
    """The only process of a run, or one of several without the others."""

    def __init__(self, index=0, count=1):
        self.index, self.count = index, count

    def gather(self, values):
        return values


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache's folder, the test's own."""
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Four pictures, each under three captions; one caption is that of two pictures."""
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        captions = [
            f"picture {index}",
            f"the picture of number {index}",
            "a red star" if index < 2 else f"star {index}",
        ]
        lines += [{"file_name": f"{index}.png", "caption": caption} for caption in captions]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return images


def bound(source):
    source.bind("source", 0, OneProcess())
    return source


def policy_of(checkpoint, **options) -> Policy:
    backbone = load_backbone(str(checkpoint), device="cpu", **options)
    return Policy(backbone, {"lora": LoRA(rank=2, banks=2)}, ema_decay=0.9)


def losses(policy, objective, source, steps=2) -> list[float]:
    trainer = Trainer(policy, [Term(objective, source, name="term")], steps=steps)
    return [trainer.run_step()["loss"] for _ in range(steps)]


def number_of_rows(folder, kind: str) -> int:
    import datasets

    (found,) = folder.glob(f"{kind}-*")
    name = {"latents": "latents", "text": "captions"}[kind]
    return sum(len(datasets.Dataset.from_file(str(path))) for path in (found / name).glob("*.arrow"))


def kept(folder, kind: str) -> set[str]:
    return {path.name for path in folder.glob(f"{kind}-*")}


@pytest.mark.parametrize("what", ["latents", "all"])
def test_batches_from_the_cache_are_those_without_it_rounded_to_bfloat16(each_checkpoint, folder, what):
    policy = policy_of(each_checkpoint)
    plain, cached = (bound(Pairs(str(folder), 4, cache=choice)) for choice in (None, what))
    for _ in range(4):
        one, other = plain.next(policy), cached.next(policy)
        assert one.prompts == other.prompts
        torch.testing.assert_close(other.latents, one.latents, rtol=BF16, atol=1e-6)
        assert other.latents.dtype == one.latents.dtype
        text, known = one.encode_text(policy.backbone), other.encode_text(policy.backbone)
        torch.testing.assert_close(known.embeds, text.embeds, rtol=BF16, atol=1e-6)
        assert known.embeds.dtype == text.embeds.dtype and known.prompts == text.prompts
        assert (text.pooled is None) == (known.pooled is None)
        if text.pooled is not None:
            torch.testing.assert_close(known.pooled, text.pooled, rtol=BF16, atol=1e-6)


def test_text_of_a_bfloat16_base_is_kept_bit_for_bit(each_checkpoint, folder):
    policy = policy_of(each_checkpoint, dtype="bfloat16")
    batch = bound(Pairs(str(folder), 12, cache="all")).next(policy)
    for row, prompt in enumerate(batch.prompts):
        found = policy.backbone.encode_text([prompt])
        torch.testing.assert_close(batch.cond.embeds[row], found.embeds[0], rtol=BF16, atol=1e-2)
        assert torch.equal(unpack(pack(found.embeds[0])).float(), found.embeds[0])


def test_a_run_from_the_cache_equals_a_run_without_it_within_bfloat16(each_checkpoint, folder):
    expected = losses(policy_of(each_checkpoint), AGSM(group_size=2), Pairs(str(folder), 4))
    found = losses(policy_of(each_checkpoint), AGSM(group_size=2), Pairs(str(folder), 4, cache="all"))
    assert found == pytest.approx(expected, rel=BF16)


def test_dropped_captions_are_the_empty_prompt_with_the_cache_too(tiny_checkpoint, folder):
    objective = ScoreMatching(caption_dropout=0.5)
    expected, found = (
        losses(policy_of(tiny_checkpoint), objective, Pairs(str(folder), 4, cache=choice)) for choice in (None, "all")
    )
    assert found == pytest.approx(expected, rel=BF16)


def test_processes_share_the_cache_and_the_batch_that_one_process_would_take(tiny_checkpoint, folder, cache):
    policy = policy_of(tiny_checkpoint)
    whole = bound(Pairs(str(folder), 4, cache="all")).next(policy)
    parts = []
    for index in range(2):
        source = Pairs(str(folder), 4, cache="all")
        source.bind("source", 0, OneProcess(index, 2))
        parts.append(source.next(policy))
    assert whole.prompts == parts[0].prompts + parts[1].prompts
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    assert torch.equal(whole.cond.embeds, torch.cat([part.cond.embeds for part in parts]))
    assert len(kept(cache, "latents")) == len(kept(cache, "text")) == 1


def test_preferences_from_the_cache_train_as_without_it(tiny_checkpoint):
    runs = [
        losses(
            policy_of(tiny_checkpoint),
            DiffusionDPO(beta=10.0),
            Preferences("builtin:shapes-preferences", 4, num_pairs=8, cache=choice),
        )
        for choice in (None, "latents", "all")
    ]
    assert runs[1] == pytest.approx(runs[0], rel=BF16)
    assert runs[2] == pytest.approx(runs[0], rel=BF16)


def test_a_later_run_encodes_nothing(tiny_checkpoint, folder, monkeypatch):
    expected = losses(policy_of(tiny_checkpoint), AGSM(group_size=2), Pairs(str(folder), 4, cache="all"))
    policy = policy_of(tiny_checkpoint)

    def refuse(*_, **__):
        raise AssertionError("something is encoded again")

    monkeypatch.setattr(policy.backbone, "encode_text", refuse)
    monkeypatch.setattr(policy.backbone, "encode_images", refuse)
    assert losses(policy, AGSM(group_size=2), Pairs(str(folder), 4, cache="all")) == expected


def test_each_image_and_each_caption_is_kept_once(tiny_checkpoint, folder, cache):
    bound(Pairs(str(folder), 4, cache="all")).next(policy_of(tiny_checkpoint))
    assert number_of_rows(cache, "latents") == 4
    assert number_of_rows(cache, "text") == 11


def test_an_image_is_known_by_its_bytes_where_it_has_no_path(tmp_path, tiny_checkpoint, cache):
    import datasets

    file = BytesIO()
    Image.new("RGB", (16, 16), 90).save(file, format="PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 4, "caption": ["a", "b", "c", "d"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    bound(Pairs(str(tmp_path / "x.parquet"), 4, cache="latents")).next(policy_of(tiny_checkpoint))
    assert number_of_rows(cache, "latents") == 1


def change_a_weight(module):
    *_, last = module.parameters()
    last.data.view(-1)[0] += 0.5


@pytest.mark.parametrize(
    ("change", "new"),
    [
        (lambda policy: change_a_weight(policy.backbone.pipeline.vae), {"latents"}),
        (lambda policy: policy.backbone.pipeline.vae.register_to_config(scaling_factor=0.5), {"latents"}),
        (lambda policy: change_a_weight(policy.backbone.pipeline.text_encoder), {"text"}),
        (lambda policy: change_a_weight(policy.backbone.pipeline.text_encoder_3), {"text"}),
        (lambda policy: policy.backbone.pipeline.tokenizer.add_tokens(["zebra"]), {"text"}),
        (lambda policy: change_a_weight(policy.backbone.denoiser), set()),
        (lambda policy: policy.backbone.encode_text(["a star", "two red circles"]), set()),
    ],
)
def test_other_encoders_are_another_cache_and_another_denoiser_is_not(tiny_sd3_checkpoint, folder, cache, change, new):
    bound(Pairs(str(folder), 4, cache="all")).next(policy_of(tiny_sd3_checkpoint))
    policy = policy_of(tiny_sd3_checkpoint)
    change(policy)
    bound(Pairs(str(folder), 4, cache="all")).next(policy)
    for kind in ("latents", "text"):
        assert len(kept(cache, kind)) == (2 if kind in new else 1)


@pytest.mark.parametrize(
    ("options", "new"),
    [({"resolution": 32}, {"latents"}), ({"t5_length": 20}, {"text"}), ({"dtype": "bfloat16"}, {"latents", "text"})],
)
def test_another_size_or_precision_is_another_cache(tiny_sd3_checkpoint, folder, cache, options, new):
    for given in ({}, options):
        batch = bound(Pairs(str(folder), 4, cache="all")).next(policy_of(tiny_sd3_checkpoint, **given))
    assert batch.latents.shape[-1] == options.get("resolution", 16) // 2
    assert (
        batch.cond.embeds.shape[1]
        == policy_of(tiny_sd3_checkpoint, **options).backbone.encode_text(["a"]).embeds.shape[1]
    )
    for kind in ("latents", "text"):
        assert len(kept(cache, kind)) == (2 if kind in new else 1)


def test_the_same_weights_elsewhere_are_recognised(tiny_checkpoint, folder, cache, tmp_path):
    bound(Pairs(str(folder), 4, cache="all")).next(policy_of(tiny_checkpoint))
    bound(Pairs(str(folder), 4, cache="all")).next(policy_of(shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere")))
    assert len(kept(cache, "latents")) == len(kept(cache, "text")) == 1


def test_changed_pictures_and_captions_are_encoded_anew(tiny_checkpoint, folder, cache):
    policy = policy_of(tiny_checkpoint)
    before = bound(Pairs(str(folder), 12, cache="all")).next(policy)
    Image.new("RGB", (16, 16), 200).save(folder / "0.png")
    after = bound(Pairs(str(folder), 12, cache="all")).next(policy)
    rows = zip(before.prompts, before.latents, after.latents, strict=True)
    changed = {prompt for prompt, one, other in rows if not torch.equal(one, other)}
    assert {"picture 0", "the picture of number 0"} <= changed <= {"picture 0", "the picture of number 0", "a red star"}
    assert (len(kept(cache, "latents")), len(kept(cache, "text"))) == (2, 1)
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("picture 3", "picture three"))
    assert "picture three" in bound(Pairs(str(folder), 12, cache="all")).next(policy).prompts
    assert len(kept(cache, "text")) == 2


def test_a_source_that_is_asked_with_another_backbone_gives_that_one_s_encodings(tiny_checkpoint, folder):
    source = bound(Pairs(str(folder), 12, cache="all"))
    first = source.next(policy_of(tiny_checkpoint))
    other = policy_of(tiny_checkpoint)
    change_a_weight(other.backbone.pipeline.text_encoder)
    second = source.next(other)
    rows = {prompt: row for row, prompt in enumerate(second.prompts)}
    assert not torch.equal(first.cond.embeds, second.cond.embeds[[rows[prompt] for prompt in first.prompts]])


def test_an_image_that_cannot_be_read_is_passed_over_as_without_the_cache(tiny_checkpoint, folder, caplog):
    (folder / "2.png").write_bytes(b"no picture")
    policy = policy_of(tiny_checkpoint)
    plain, cached = (bound(Pairs(str(folder), 12, cache=choice)) for choice in (None, "all"))
    assert plain.next(policy).prompts == cached.next(policy).prompts
    assert plain.metrics() == cached.metrics() != {}
    told = [message for message in caplog.messages if "its image cannot be read" in message]
    assert len(told) == 6 and {message[:60] for message in told[:3]} & {message[:60] for message in told[3:]}


def test_latents_that_are_not_finite_are_refused(tiny_checkpoint, folder):
    policy = policy_of(tiny_checkpoint)
    next(policy.backbone.pipeline.vae.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="its images are not finite under stable_diffusion; float16 overflows"):
        bound(Pairs(str(folder), 4, cache="latents")).next(policy)


def test_a_text_encoder_that_learns_needs_its_prompts_encoded_anew(tiny_checkpoint, folder):
    backbone = load_backbone(str(tiny_checkpoint), device="cpu")
    policy = Policy(backbone, {"lora": LoRA(rank=2, text_encoders=True)})
    with pytest.raises(UserError, match="an adapter changes the text encoders.*`cache: latents`"):
        bound(Pairs(str(folder), 4, cache="all")).next(policy)
    assert bound(Pairs(str(folder), 4, cache="latents")).next(policy).cond is None


def test_a_recipe_that_keeps_text_of_an_encoder_that_learns_is_refused_when_it_is_read(tiny_checkpoint):
    content = {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint)},
        "adapters": {"lora": {"use": "lora", "text_encoders": True}},
        "objectives": [
            {"use": "score_matching", "source": {"use": "pairs", "dataset": "builtin:shapes", "cache": "all"}}
        ],
    }
    with pytest.raises(UserError, match=r"objectives\[0\]\.source\.cache: an adapter changes the text encoders"):
        Recipe.from_data(content)
    content["objectives"][0]["source"]["cache"] = "latents"
    assert Recipe.from_data(content).objectives[0].source.options["cache"] == "latents"


@pytest.mark.parametrize("source", [Pairs, Preferences])
def test_streams_and_unknown_words_are_refused(source):
    with pytest.raises(UserError, match="cache: the rows of a streamed data set have no numbers"):
        source("anything", cache="latents", streaming=True)
    with pytest.raises(UserError, match="cache: '/tmp/x' is not a thing to keep; allowed: all, latents"):
        source("anything", cache="/tmp/x")


def test_the_folder_is_named_by_the_environment_alone(monkeypatch, cache):
    import datasets

    assert cache_folder() == cache
    monkeypatch.delenv("AGSM_RL_CACHE")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "of_datasets")
    assert cache_folder() == cache / "of_datasets" / "agsm_rl"


def test_a_folder_that_cannot_be_written_is_told(tiny_checkpoint, folder, cache):
    cache.write_text("a file stands here")
    with pytest.raises(UserError, match="it cannot be written .*set AGSM_RL_CACHE to another folder"):
        bound(Pairs(str(folder), 4, cache="latents")).next(policy_of(tiny_checkpoint))


def test_zeros_at_the_ends_of_rows_take_no_room_and_come_back(sd3_backbone):
    embeds = sd3_backbone.encode_text(["a red star"]).embeds[0].bfloat16()
    clips = embeds[: -sd3_backbone.t5_length]
    assert not clips[:, 56:].any()
    row = pack(embeds)
    assert len(row["values"]) == embeds.numel() - len(clips) * (64 - 56)
    assert torch.equal(unpack(row), embeds)
    assert torch.equal(unpack(pack(torch.zeros(3, 5))), torch.zeros(3, 5).bfloat16())

"""Text encoders and autoencoders that wait on the CPU or are dropped: the same numbers, and nothing encoded twice."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.text_cache import up_to_drawing
from agsm_rl.backbones.text_store import AT_ONCE
from agsm_rl.doctor.memory.predict import predict
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw
from agsm_rl.interfaces import Cond
from agsm_rl.policy import Policy
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.lifecycle import train

PROMPTS = ["a red star", "two blue circles of a kind", "green", "a ring", "a blue moon"]
SEEDS = [1, 2, 3, 4, 5]


class OneProcess:
    """The only process of a run, or one of several without the others."""

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, the test's own."""
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(one: Cond, other: Cond) -> bool:
    pairs = [(one.embeds, other.embeds), (one.pooled, other.pooled), (one.mask, other.mask)]
    return one.prompts == other.prompts and all(a is b is None or torch.equal(a, b) for a, b in pairs)


def weights_of(backbone) -> int:
    """Bytes of the text encoders' weights that are in memory."""
    parts = [part for name, part in backbone.pipeline.components.items() if name.startswith("text_encoder")]
    parameters = [parameter for part in parts if part is not None for parameter in part.parameters()]
    return sum(parameter.untyped_storage().nbytes() for parameter in parameters if parameter.stride().count(0) == 0)


def test_texts_and_drawings_are_those_of_encoders_that_stay_loaded(each_checkpoint: Path, caplog) -> None:
    assert_same(each_checkpoint, "cache", caplog)


def test_encoders_that_wait_on_the_cpu_give_the_same_too(tiny_checkpoint: Path, caplog) -> None:
    assert_same(tiny_checkpoint, "offload", caplog)


def assert_same(checkpoint: Path, keep: str, caplog) -> None:
    """Texts and drawings of all sorts are the same to the bit, and no text is encoded twice."""
    plain = load_backbone(str(checkpoint), device="cpu")
    backbone = load_backbone(str(checkpoint), device="cpu", text={"keep": keep})
    texts = backbone.text_cache
    texts.fill(backbone, PROMPTS, OneProcess())
    encoded = texts.encoded
    for batch in (PROMPTS, PROMPTS[1:3], [PROMPTS[0]], [PROMPTS[2]] * 3, PROMPTS[::-1]):
        assert same(backbone.encode_text(batch), plain.encode_text(batch))
    assert texts.encoded == encoded  # all were in the store
    with up_to_drawing(backbone):
        draw(backbone, PROMPTS, SEEDS, guidance=3.0, num_steps=2, negative_prompt="blurred")
        raise AssertionError("drawn")
    texts.end_step(), texts.end_step()
    assert (weights_of(backbone) == 0) == (keep == "cache")
    for guidance, negative in ((3.0, "blurred"), (1.0, None)):
        pictures = [
            draw(one, PROMPTS, SEEDS, guidance=guidance, num_steps=2, negative_prompt=negative)
            for one in (plain, backbone)
        ]
        assert torch.equal(*pictures)
    assert "loaded again" not in caplog.text
    assert same(backbone.encode_text(["a new one", ""]), plain.encode_text(["a new one", ""]))
    assert caplog.text.count("loaded again") == (keep == "cache")
    assert weights_of(backbone) == weights_of(plain)


def test_a_second_start_encodes_nothing_and_a_damaged_file_is_made_again(
    tiny_checkpoint: Path, cache: Path, caplog
) -> None:
    first, second = (load_backbone(str(tiny_checkpoint), device="cpu", text={"keep": "cache"}) for _ in range(2))
    # The two processes of a run take a share each, and then have all.
    for index, backbone in enumerate((first, second)):
        backbone.text_cache.fill(backbone, PROMPTS, OneProcess(index, 2))
    encoded = [backbone.text_cache.encoded for backbone in (first, second)]
    expected = first.encode_text(PROMPTS)
    assert same(second.encode_text(PROMPTS), expected)
    assert [backbone.text_cache.encoded for backbone in (first, second)] == encoded
    files = sorted(cache.glob("prompts-*/*/*.safetensors"))
    about = json.loads(next(cache.glob("prompts-*/about.json")).read_text())
    assert about["of"] == str(tiny_checkpoint) and about["encoders"] == first.identity("text")
    for file in files:
        file.write_bytes(file.read_bytes()[:-7])
    third = load_backbone(str(tiny_checkpoint), device="cpu", text={"keep": "cache"})
    assert same(third.encode_text(PROMPTS), expected)
    assert "is damaged and will be made again" in caplog.text
    assert third.text_cache.encoded == len([" ", *PROMPTS])  # " " shows how wide its text is
    half = load_backbone(str(tiny_checkpoint), device="cpu", dtype="bfloat16", text={"keep": "cache"})
    assert half.identity("text") != first.identity("text")
    assert half.encode_text(PROMPTS).embeds.abs().max() > 0 and half.text_cache.encoded >= len(PROMPTS)


def test_texts_that_do_not_fit_on_the_disk_are_refused_before_most_are_encoded(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(tiny_checkpoint), device="cpu", text={"keep": "cache"})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"GB of encoded texts are still to be written.*AGSM_RL_CACHE.*keep: offload"):
        backbone.text_cache.fill(backbone, [f"star {number}" for number in range(400)], OneProcess())
    assert backbone.text_cache.encoded <= 1 + AT_ONCE


def test_encoders_that_cannot_be_loaded_again_are_an_error_that_says_what_to_do(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, folder)
    backbone = load_backbone(str(folder), device="cpu", text={"keep": "cache"})
    backbone.text_cache.encoders.free()
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"backbone\.text: .*cannot be loaded again: .*Restore the checkpoint"):
        backbone.encode_text(["new"])


@pytest.fixture
def recipe(tiny_checkpoint: Path, tmp_path: Path):
    """Rollouts, pairs, a teacher with a suffix, an evaluation and sample grids, with encoders that are kept somehow."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue circle\ntwo green squares\n")
    rollouts = {"use": "rollouts", "prompts": str(prompts), "rewards": {"brightness": 1.0}, "num_prompts": 2}
    rollouts |= {"images_per_prompt": 2, "num_steps": 2, "guidance": 2.0, "negative_prompt": "blurred"}

    def make(keep: str) -> Recipe:
        content = {
            "steps": 3,
            "backbone": {"use": "auto", "checkpoint": str(tiny_checkpoint), "device": "cpu", "text": {"keep": keep}},
            "adapters": {"lora": {"use": "lora", "rank": 2}},
            "sources": {"own": rollouts},
            "objectives": [
                {"use": "ddpo", "source": "own"},
                {"use": "opd", "source": "own", "prompt_suffix": ", best quality"},
                {
                    "use": "agsm",
                    "source": {"use": "pairs", "dataset": "builtin:shapes", "num_images": 4, "batch_size": 4},
                },
            ],
            "evaluate": {
                "num_images": 2,
                "num_steps": 2,
                "guidance": 2.0,
                "prompt_suffix": ", sharp",
                "keep_base": False,
            },
            "sample": {"every": 2, "num_images": 2, "num_steps": 2, "prompts": ["a circle", "a star"]},
            "track": [],
        }
        return Recipe.from_data(content, where="recipe.yaml")

    return make


@pytest.mark.slow
def test_a_run_learns_and_measures_the_same_and_loads_no_encoder_twice(recipe, tmp_path: Path, caplog) -> None:
    folders = {keep: train(recipe(keep), tmp_path / "runs" / keep) for keep in ("load", "cache")}
    lines = {
        keep: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for keep, folder in folders.items()
    }
    rows = {keep: [{k: v for k, v in row.items() if k != "seconds"} for row in of] for keep, of in lines.items()}
    assert rows["load"] == rows["cache"]
    files = [folder / "eval.json" for folder in folders.values()]
    assert files[0].read_text() == files[1].read_text()
    assert "loaded again" not in caplog.text


def test_an_adapter_that_changes_the_text_is_refused_before_anything_is_read(recipe) -> None:
    data = recipe("offload").to_data()
    data["adapters"]["lora"]["text_encoders"] = True
    changed = Recipe.from_data(data, where="recipe.yaml")
    with pytest.raises(UserError, match=r"recipe\.yaml: backbone\.text: .*leave out `text`.*`text_encoders: false`"):
        predict(changed)


def test_an_autoencoder_waits_between_its_uses_and_stays_for_a_backward_pass(tiny_xl_checkpoint: Path) -> None:
    plain = load_backbone(str(tiny_xl_checkpoint), device="cpu")
    backbone = load_backbone(str(tiny_xl_checkpoint), device="cpu", cpu_offload="model")
    assert backbone.waiting == {"vae", "text_encoder", "text_encoder_2"}
    vae, moved = backbone.pipeline.vae, []
    vae.to = lambda device: moved.append(str(device))
    images = torch.rand(2, 3, backbone.resolution, backbone.resolution)
    latents = backbone.encode_images(images)
    assert torch.equal(latents, plain.encode_images(images)) and moved[-1] == "cpu" and len(moved) > 1
    moved.clear()
    latents.requires_grad_(True)
    gradients = [torch.autograd.grad(one.decode(latents).sum(), latents)[0] for one in (plain, backbone)]
    assert torch.equal(*gradients) and len(set(moved)) == 1  # came, and did not go
    assert draw(backbone, PROMPTS, SEEDS, guidance=2.0, num_steps=2).isfinite().all()
    assert moved[-1] == "cpu"
    tiled = load_backbone(str(tiny_xl_checkpoint), device="cpu", vae_slicing=True, vae_tiling=True)
    torch.testing.assert_close(tiled.encode_images(images), plain.encode_images(images), rtol=1e-4, atol=1e-5)
    assert tiled.identity("images") != plain.identity("images")  # an image of several tiles is another


def test_what_cannot_wait_is_refused_with_what_to_do(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.cpu_offload: got 'sequential'; .*trained through.*keep: cache"):
        load_backbone(str(tiny_checkpoint), device="meta", cpu_offload="sequential")
    with pytest.raises(UserError, match=r"backbone\.text\.keep.*'cach'.*cache"):
        load_backbone(str(tiny_checkpoint), device="meta", text={"keep": "cach"})
    backbone = load_backbone(str(tiny_checkpoint), device="cpu", text={"keep": "offload"})
    with pytest.raises(UserError, match=r"backbone\.text: an adapter changes the text encoders"):
        Policy(backbone, {"lora": LoRA(rank=2, text_encoders=True)})

"""What the kept figures of a base depend on, and what processes that need the same ones do."""

import json
import shutil
import sys
import threading

import pytest
import torch
from filelock import FileLock

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.oft import OFT
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.errors import UserError
from agsm_rl.evaluate import kept_base
from agsm_rl.evaluate.base_settings import NotKept, base_settings, files_named, identity_of
from agsm_rl.evaluate.kept_base import KeptBase
from agsm_rl.evaluate.measured import Entry, Measured, entries_of, measure
from agsm_rl.policy import Policy
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import Block, Evaluate
from agsm_rl.sources.cache_folder import cache_folder

BLOCK = Block.model_validate({"use": "stable_diffusion", "checkpoint": "here", "device": "cpu"})
PARTS = Parts(where="test", allow_imports=["mine"])


def settings(backbone, *, block: Block = BLOCK, guidance: float = 1.0, **evaluate) -> dict:
    size = {} if "suites" in evaluate else {"num_images": 2}
    options = Evaluate.model_validate({"num_steps": 1, "batch_size": 2} | size | evaluate)
    (entry,) = entries_of(options, PARTS)
    return base_settings(identity_of(backbone), backbone, block, entry, options, guidance, PARTS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"lora": LoRA(rank=2, banks=2), "tokens": SoftTokens(num_tokens=2)},
        lambda: {"lora": LoRA(rank=2, use_dora=True, text_encoders=True)},
        lambda: {"oft": OFT()},
        lambda: {"one": LoRA(rank=2), "two": LoRA(rank=2)},
    ],
    ids=["LoRA and tokens", "DoRA on text encoders", "OFT", "two on a layer"],
)
def test_adapters_do_not_change_what_a_base_is(backbone, make):
    before = identity_of(backbone)
    policy = Policy(backbone, make())
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(1.0)
    assert identity_of(backbone) == before


def test_every_weight_and_the_schedule_are_part_of_what_a_base_is(make_backbone):
    plain, found = identity_of(make_backbone()), set()
    for part in ("unet", "vae", "text_encoder"):
        backbone = make_backbone()
        with torch.no_grad():
            next(getattr(backbone.pipeline, part).parameters()).view(-1)[0] += 1
        found.add(identity_of(backbone))
    backbone = make_backbone()
    backbone.pipeline.scheduler.register_to_config(beta_end=0.03)
    assert len({plain, *found, identity_of(backbone)}) == 5


def test_the_same_weights_in_another_folder_are_the_same_base(backbone):
    elsewhere = Block.model_validate({**BLOCK.model_dump(), "checkpoint": "there", "device": None})
    assert settings(backbone) == settings(backbone, block=elsewhere)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"num_images": 3},
        {"num_steps": 2},
        {"guidance": 2.0},
        {"split": "validation"},
        {"batch_size": 1},
        {"prompt_suffix": ", best"},
        {"rewards": ["brightness"]},
        {"rewards": {"b": {"use": "jpeg_compressibility"}}},
        {"block": Block.model_validate({**BLOCK.model_dump(), "vae_slicing": True})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_may_change_a_figure_changes_the_settings(backbone, change):
    assert settings(backbone, **change) != settings(backbone)


def test_the_trained_model_s_options_do_not_matter(backbone):
    trained = {"every": 7, "bank": "negative", "guidance_bank": "negative", "keep_base": False}
    assert settings(backbone, **trained) == settings(backbone)


def test_a_file_that_an_option_names_is_known_by_its_time_and_prompts_by_their_text(backbone, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n")
    shutil.copyfile(tmp_path / "p.txt", tmp_path / "q.txt")

    def on(prompts: str) -> dict:
        suite = {"use": "rewards", "prompts": str(tmp_path / prompts), "rewards": {"s": {"use": "sharpness"}}}
        return settings(backbone, suites={"mine": suite})

    first = on("p.txt")
    assert on("q.txt") == first
    (tmp_path / "p.txt").write_text("a dog\n")
    assert on("p.txt") != first
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.png").write_text("1")
    options = {"reference": str(tmp_path / "photos"), "prompts": str(tmp_path / "p.txt"), "rewards": {"a": {"b": ""}}}
    named = files_named(options)
    assert list(named) == [options["reference"]] and files_named(options) == named
    (tmp_path / "photos/one.png").write_text("12")
    assert files_named(options) != named


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def grey(images, prompts):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mine", None)


def test_figures_by_code_of_the_user_s_or_of_another_host_are_not_kept(backbone, mine):
    with pytest.raises(NotKept, match="mine:grey is code of your own, which may change"):
        settings(backbone, rewards={"grey": {"use": "mine:grey"}})


def make_kept(said: list[str], **more) -> KeptBase:
    return KeptBase(BLOCK, PARTS, tell=said.append, **more)


@pytest.fixture
def evaluation() -> tuple[Evaluate, Entry]:
    options = Evaluate.model_validate({"num_images": 2, "num_steps": 1, "batch_size": 2, "guidance": 1.0})
    return options, entries_of(options, PARTS)[0]


@pytest.fixture
def measured(backbone, evaluation):
    """Ask for the base's measurement; returns it, what was said, and whether it was made."""

    def measured(**changes) -> tuple[Measured, list[str], bool]:
        made: list[bool] = []
        said: list[str] = []
        options = Evaluate.model_validate({**evaluation[0].model_dump(exclude_unset=True), **changes})
        (entry,) = entries_of(options, PARTS)

        def make() -> Measured:
            made.append(True)
            return measure(backbone, entry, options, options.guidance[0])

        return make_kept(said).measured(backbone, entry, options, options.guidance[0], make), said, bool(made)

    return measured


def test_a_kept_measurement_is_the_one_that_was_made(measured):
    made, said, is_made = measured()
    assert is_made and not said
    kept, said, is_made = measured()
    assert not is_made and len(said) == 1
    assert "the base's figures of shapes, measured earlier with the same settings, are read from" in said[0]
    assert kept.to_json() == made.to_json() and kept.pictures == made.pictures and kept.judged == made.judged
    assert measured(guidance=2.0)[2] and measured(keep_base=False)[2]


@pytest.mark.parametrize("damage", ["a verdict", "another picture", "no picture", "half"])
def test_a_damaged_entry_is_made_again_and_said(measured, caplog, damage):
    before = measured()[0]
    (file,) = cache_folder().glob("figures-*/shapes-guidance1-*.json")
    text, picture = file.read_text(), file.with_suffix("") / "0001.png"
    if damage == "a verdict":
        content = json.loads(text)
        content["judged"][0][0]["row"]["correct"] ^= True
        file.write_text(json.dumps(content))
    elif damage == "half":
        file.write_text(text[: len(text) // 2])
    elif damage == "another picture":
        shutil.copyfile(picture.with_name("0000.png"), picture)
    else:
        picture.unlink()
    after, _, is_made = measured()
    assert is_made and caplog.text.count(f"{file}: is damaged") == 1
    assert after.to_json() == before.to_json()
    assert not measured()[2]


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "file/cache"))
    kept, said, is_made = measured()
    assert is_made and kept.judged[0] and len(said) == 1
    assert "the base's figures are not kept for other runs:" in said[0]
    assert "set AGSM_RL_CACHE to another folder" in said[0]


def test_a_run_waits_for_another_that_measures_the_same_base(backbone, evaluation, monkeypatch):
    monkeypatch.setattr(kept_base, "POLL", 0.01)
    options, entry = evaluation
    measures, held, checked = [], threading.Event(), threading.Event()

    def slowly() -> Measured:
        held.set()
        assert checked.wait(60)
        measures.append("first")
        return measure(backbone, entry, options, 1.0)

    first = threading.Thread(target=lambda: make_kept([]).measured(backbone, entry, options, 1.0, slowly))
    first.start()
    assert held.wait(60)
    said: list[str] = []
    second = make_kept(said, check=lambda: checked.set() if said else None)
    kept = second.measured(backbone, entry, options, 1.0, lambda: measures.append("second"))
    first.join()
    assert measures == ["first"] and kept.judged[0] and len(kept.pictures) == 2
    assert "waiting for another run" in said[0] and "are read from" in said[1]


def test_what_interrupts_the_wait_ends_it(backbone, evaluation, measured, monkeypatch):
    monkeypatch.setattr(kept_base, "POLL", 0.01)
    options, entry = evaluation
    measured()
    (file,) = cache_folder().glob("figures-*/shapes-*.json")
    file.unlink()
    looks = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 2:
            raise UserError("a signal")

    with FileLock(file.with_suffix(".lock")), pytest.raises(UserError, match="a signal"):
        make_kept([], check=check).measured(backbone, entry, options, 1.0, lambda: None)


class Shared:
    """One of two processes in threads of one program, which exchange objects."""

    count = 2

    def __init__(self, index: int, given: list, barrier: threading.Barrier) -> None:
        self.index, self.given, self.barrier = index, given, barrier

    def gather_objects(self, values: list) -> list:
        self.given[self.index] = values[0]
        self.barrier.wait(60)
        everyone = list(self.given)
        self.barrier.wait(60)
        return everyone


def test_all_processes_have_what_the_first_one_reads_and_measure_together_what_is_missing(
    backbone, evaluation, monkeypatch, tmp_path
):
    options, entry = evaluation
    made = measure(backbone, entry, options, 1.0)
    given, barrier, asked = [None, None], threading.Barrier(2), []

    def of(index: int, results: dict) -> None:
        def measured_here() -> Measured:
            asked.append(index)
            return made

        kept = make_kept([])
        results[index] = kept.measured(
            backbone, entry, options, 1.0, measured_here, processes=Shared(index, given, barrier)
        )

    for expected in ([0, 1], []):
        asked.clear()
        results: dict[int, Measured] = {}
        threads = [threading.Thread(target=of, args=(index, results)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(asked) == expected
        assert results[0].judged == results[1].judged == made.judged
        assert results[0].pictures == results[1].pictures == made.pictures

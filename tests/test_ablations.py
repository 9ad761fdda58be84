"""AGSM's ablations (arXiv 2605.30038) as switches of a recipe: one bank, ψ⁺ only, Bradley-Terry, ψ⁻ at inference."""

import json
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.cli.commands import app
from agsm_rl.errors import UserError
from agsm_rl.evaluate.drawing import draw, to_picture
from agsm_rl.evaluate.measured import to_json
from agsm_rl.evaluate.suites.shapes import suite_prompts
from agsm_rl.export.attach import save_adapters
from agsm_rl.recipe.build import build_backbone, build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.run.evaluation import Evaluator
from agsm_rl.run.folder import RunFolder
from agsm_rl.sweep.evaluations import CellEvaluations


@pytest.fixture
def read(tiny_checkpoint):
    """A recipe of AGSM over soft tokens and LoRA, with options for its objective and for its adapters."""

    def make(objective=(), adapters=(), **changes) -> Recipe:
        source = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 8}
        content = {
            "steps": 1,
            "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
            "adapters": {
                "tokens": {"use": "soft_tokens", "banks": 2, "jitter": 0.1, **dict(adapters)},
                "lora": {"use": "lora", "rank": 2, "banks": 2, **dict(adapters)},
            },
            "objectives": [{"use": "agsm", "source": source, **dict(objective)}],
            "track": [],
        }
        return Recipe.from_data(content | changes)

    return make


def disturb(adapters) -> None:
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters:
        for _, parameter in adapter.named_parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def moved(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What a step changes of each parameter."""
    trainer = build_trainer(recipe)
    before = {name: value.detach().clone() for name, value in trainer.policy.parameters().items()}
    trainer.train()
    return {name: value.detach() - before[name] for name, value in trainer.policy.parameters().items()}


def test_two_banks_train_both_and_positive_only_leaves_the_negative_one_alone(read):
    both, positive = moved(read()), moved(read({"gamma_negative": 0.0}))
    name = "lora.{}.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_B"
    for found in (both, positive):
        assert found[name.format("positive")].any() and found["tokens.soft_tokens"][0].any()
    assert both[name.format("negative")].any() and both["tokens.soft_tokens"][1].any()
    assert not positive[name.format("negative")].any()
    # Weight decay alone moves what got a gradient of zero beside the other bank's.
    assert positive["tokens.soft_tokens"][1].abs().max() < 1e-6


def test_one_bank_serves_own_and_other_prompts(read):
    found = moved(read(adapters={"banks": 1}))
    assert found["tokens.soft_tokens"].shape[0] == 1 and found["tokens.soft_tokens"].any()
    assert not any(name.startswith("lora.negative.") for name in found)


def test_bradley_terry_is_another_step_than_plackett_luce(read):
    one, other = moved(read()), moved(read({"preference": "bradley_terry"}))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bank", ["positive", "negative"])
def test_a_recipe_s_evaluation_draws_with_the_bank_that_it_names(read, tmp_path, bank):
    options = {"num_images": 2, "num_steps": 2, "bank": bank}
    recipe = read(evaluate=options)
    trainer = build_trainer(recipe)
    disturb(trainer.policy.adapters.values())
    folder = RunFolder(tmp_path)
    evaluation = Evaluator(folder, recipe, Console(file=StringIO()))
    suites = evaluation.measure(trainer)
    ((base, trained),) = suites["shapes"]
    backbone, prompts = trainer.policy.backbone, suite_prompts("held_out", 2, 0)
    with trainer.policy.using(bank):
        wanted = draw(backbone, prompts, [0, 1], guidance=3.0, num_steps=2)
    pictures = {row: to_picture(image) for row, image in enumerate(wanted)}
    assert trained.pictures == pictures and base.pictures != pictures
    with trainer.policy.using("negative" if bank == "positive" else "positive"):
        assert not torch.allclose(draw(backbone, prompts, [0, 1], guidance=3.0, num_steps=2), wanted)
    assert to_json(suites, recipe.evaluate)["bank"] == bank


def test_a_sweep_s_evaluation_draws_with_the_bank_that_it_names_and_shares_the_base_s(read, exported, tmp_path):
    folder = RunFolder(tmp_path)  # whose adapter/ is there
    folder.metrics.write_text("")
    evaluations = CellEvaluations(folder, read(), base=tmp_path / "base", model_id="cell")
    for bank in ("positive", "negative"):
        options = Evaluate(num_images=2, num_steps=2, bank=bank)
        evaluations.write(options, f"{bank}.json", step=1, pictures=False)
        assert json.loads((tmp_path / f"{bank}.json").read_text())["bank"] == bank
    pictures = {path.read_bytes() for path in (tmp_path / "evals").rglob("0000.png")}
    assert len(pictures) == 2 and len(list((tmp_path / "base").rglob("0000.png"))) == 1
    save_adapters({"lora": one_bank(read())}, tmp_path / "one" / "adapter", metadata={})
    alone = CellEvaluations(RunFolder(tmp_path / "one"), read(), base=tmp_path / "base", model_id="other")
    with pytest.raises(UserError, match=r"evaluate\.bank: negative, but no adapter here has a negative bank"):
        alone.write(options, "eval.json", step=1, pictures=False)


def one_bank(recipe: Recipe) -> LoRA:
    lora = LoRA(rank=2)
    lora.attach(build_backbone(recipe.backbone, parts=recipe.parts))
    return lora


def test_a_negative_bank_that_is_not_there_is_refused_when_the_recipe_is_read(read):
    with pytest.raises(UserError, match=r"evaluate\.bank: negative, but no adapter here has a negative bank"):
        read(adapters={"banks": 1}, evaluate={"bank": "negative"})
    with pytest.raises(UserError, match=r"evaluate\.bank: got 'minus'"):
        read(evaluate={"bank": "minus"})


@pytest.fixture
def exported(backbone, tiny_checkpoint, tmp_path):
    """A folder of adapters with two banks, and the pictures of each bank."""
    adapters = {"tokens": SoftTokens(), "lora": LoRA(rank=2, banks=2)}
    for adapter in adapters.values():
        adapter.attach(backbone)
    disturb(adapters.values())
    save_adapters(adapters, tmp_path / "adapter", metadata={"checkpoint": str(tiny_checkpoint)})
    pictures = {}
    for bank in ("positive", "negative"):
        with adapters["tokens"].using(bank), adapters["lora"].using(bank):
            image = draw(backbone, ["a red star"], [0], guidance=3.0, num_steps=2)[0]
        pictures[bank] = to_picture(image).tobytes()
    assert pictures["positive"] != pictures["negative"]
    return tmp_path / "adapter", pictures


def test_sample_draws_with_the_bank_that_it_is_told(exported, tmp_path):
    folder, pictures = exported
    for bank, options in {"positive": [], "negative": ["--bank", "negative"]}.items():
        how = ["--num-steps", "2", "--guidance", "3", "-o", str(tmp_path / bank)]
        done = CliRunner().invoke(app, ["sample", str(folder), "a red star", *how, *options])
        assert done.exit_code == 0, done.output
        assert Image.open(tmp_path / bank / "seed-0.png").tobytes() == pictures[bank]


def test_eval_measures_the_bank_that_it_is_told_against_the_base(exported, tmp_path):
    folder, _ = exported
    how = ["--num-images", "2", "--num-steps", "2", "--compare", "--json", str(tmp_path / "eval.json")]
    done = CliRunner().invoke(app, ["eval", str(folder), *how, "--bank", "negative"])
    assert done.exit_code == 0, done.output
    assert '"bank": "negative"' in (tmp_path / "eval.json").read_text()


def test_a_target_without_a_negative_bank_is_told(backbone, tiny_checkpoint, tmp_path):
    lora = LoRA(rank=2)
    lora.attach(backbone)
    save_adapters({"lora": lora}, tmp_path / "one", metadata={"checkpoint": str(tiny_checkpoint)})
    for target in (str(tmp_path / "one"), str(tiny_checkpoint)):
        done = CliRunner().invoke(app, ["sample", target, "a red star", "--bank", "negative"])
        assert done.exit_code == 2 and "--bank: negative, but no adapter here has a negative bank" in done.output

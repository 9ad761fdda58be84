"""The doctor: green on what is well, red with a remedy on each thing that is not."""

import hashlib
import shutil
from collections.abc import Collection
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from agsm_rl_rewards.brightness import Brightness
from rich.console import Console
from typer.testing import CliRunner

from agsm_rl.adapters.lora import LoRA
from agsm_rl.adapters.soft_tokens import SoftTokens
from agsm_rl.backbones.stable_diffusion import StableDiffusion
from agsm_rl.cli.commands import app
from agsm_rl.doctor import files
from agsm_rl.doctor.diagnosis import diagnose
from agsm_rl.doctor.rewards import golden_images, stored_scores
from agsm_rl.export.attach import save_adapters
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.registry import BUILTIN, load
from agsm_rl.run.lifecycle import train


@pytest.fixture
def content(tiny_checkpoint, tmp_path) -> dict[str, Any]:
    """AGSM and DDPO over soft tokens and LoRA on the tiny base, rewarded by brightness."""
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    own = {"use": "rollouts", "prompts": str(tmp_path / "prompts.txt"), "rewards": {"brightness": 1.0}}
    own |= {"num_prompts": 2, "images_per_prompt": 2, "num_steps": 2, "guidance": 1.0}
    pairs = {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4, "num_images": 8}
    return {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
        "adapters": {"tokens": {"use": "soft_tokens"}, "lora": {"use": "lora", "rank": 2, "banks": 2}},
        "objectives": [{"use": "agsm", "source": pairs}, {"use": "ddpo", "source": own}],
        "sample": {"num_images": 1, "num_steps": 1, "prompts": ["a red star"]},
        "track": [],
    }


def reds(content: dict[str, Any], *, run: Path | None = None, allow_imports: Collection[str] = ()) -> dict[str, str]:
    """What is red, and the line with its remedy."""
    found = list(diagnose(Recipe.from_data(content, allow_imports=allow_imports), run=run))
    assert all(finding.good or finding.remedy for finding in found)
    assert len(found) > 5
    return {finding.what: str(finding) for finding in found if not finding.good}


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_3"])
def test_a_healthy_recipe_is_green_throughout(content, kind, request):
    if kind == "stable_diffusion_3":
        checkpoint = str(request.getfixturevalue("tiny_sd3_checkpoint"))
        content["backbone"] = {"use": kind, "checkpoint": checkpoint, "device": "cpu"}
    assert reds(content) == {}


def test_text_encoders_of_which_a_layer_has_no_say_are_healthy_too(content, tiny_xl_checkpoint):
    content["backbone"]["checkpoint"] = str(tiny_xl_checkpoint)
    content["adapters"] = {"lora": {"use": "lora", "rank": 2, "banks": 2, "text_encoders": True}}
    assert reds(content) == {}


def test_every_shipped_reward_without_weights_has_stored_scores_and_gives_them():
    images, prompts = golden_images()
    for target in {target for target in BUILTIN["rewards"].values() if stored_scores(target, {}) is not None}:
        stored = stored_scores(target, {})
        module, _, name = target.partition(":")
        scores = getattr(__import__(module, fromlist=[name]), name)()(images, prompts)
        assert torch.allclose(scores, torch.tensor(stored[0]), rtol=stored[1], atol=1e-6)
    for name in ("brightness", "jpeg_compressibility", "jpeg_incompressibility", "sharpness"):
        assert stored_scores(BUILTIN["rewards"][name], {}) is not None
    for verdict in ("strict", "lenient", "graded"):
        wanted, _ = stored_scores(BUILTIN["rewards"]["shapes"], {"verdict": verdict})
        assert load("rewards", "shapes", where="")(verdict=verdict)(images, prompts).tolist() == pytest.approx(wanted)
        assert len(set(wanted)) > 1


def test_a_constant_reward_and_one_that_fails_are_caught(content, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "doctored_rewards.py").write_text(
        "import torch\n"
        "class Odd:\n"
        "    range, differentiable = (0.0, 1.0), False\n"
        "    def __init__(self, *, kind: str): self.name, self.kind = 'odd', kind\n"
        "    def __call__(self, images, prompts):\n"
        "        if self.kind == 'fails': raise KeyError('weights')\n"
        "        return torch.full((len(prompts),), 0.5 if self.kind == 'constant' else float('nan'))\n"
    )
    words = {"constant": "gives 0.5 to all 10 golden images", "fails": "weights", "nan": "its score is nan"}
    for kind, word in words.items():
        content["objectives"][1]["source"]["rewards"] = {"doctored_rewards:Odd": {"kind": kind}}
        found = reds(content, allow_imports={"doctored_rewards"})
        line = found["reward 'odd'"]
        assert word in line and "remedy: " in line


def test_each_reward_is_checked_that_has_options_of_its_own(content, tmp_path, monkeypatch):
    for kind in ("good", "fails"):
        (tmp_path / f"{kind}.py").write_text(
            "from agsm_rl_worker import serve\n"
            f"kind = {kind!r}\n"
            "class Scores:\n"
            "    def __call__(self, images, prompts):\n"
            "        return list(range(len(prompts))) if kind == 'good' else 1 / 0\n"
            "serve(Scores)\n"
        )
    how = {"use": "worker", "retries": 0}
    content["objectives"][1]["source"]["rewards"] = {
        kind: how | {"script": str(tmp_path / f"{kind}.py")} for kind in ("fails", "good")
    }
    allowed = {f"command:{tmp_path / kind}.py" for kind in ("good", "fails")}
    found = reds(content, allow_imports=allowed)
    assert "ZeroDivisionError" in found["reward 'fails'"]


def test_a_reward_that_scores_otherwise_than_stored_is_caught(content, monkeypatch):
    monkeypatch.setattr(Brightness, "__call__", lambda self, images, prompts: images.square().mean(dim=(1, 2, 3)))
    (line,) = reds(content).values()
    assert "differ by up to" in line


def test_a_place_that_lost_its_hook_is_named(content, monkeypatch):
    attach = SoftTokens.attach

    def without_the_last_hook(tokens, backbone):
        attach(tokens, backbone)
        tokens._hooks[-1].remove()

    monkeypatch.setattr(SoftTokens, "attach", without_the_last_hook)
    found = reds(content)
    assert "it acts at 2 of the 3 modules that its options name: mid_block" in found["adapter 'tokens' bound"]


def test_an_adapter_that_does_nothing_is_caught(content, monkeypatch):
    monkeypatch.setattr(LoRA, "_switch", lambda lora, bank: vars(lora).update(bank=bank))
    monkeypatch.setattr(LoRA, "attach", _attached_but_inactive(LoRA.attach))
    found = reds(content)
    assert {"adapter 'lora' on", "adapter 'lora' bound", "adapter 'lora' learns"} <= set(found)


def _attached_but_inactive(attach):
    def made(lora, backbone):
        attach(lora, backbone)
        for layer in lora._layers.values():
            layer.set_adapter([])
            layer.requires_grad_(True)

    return made


def test_an_adapter_that_cannot_be_switched_off_is_caught(content, monkeypatch):
    monkeypatch.setattr(SoftTokens, "rows_for", _with_bank(SoftTokens.rows_for))
    assert "predictions differ from the base's" in reds(content)["adapters off"]


def _with_bank(rows_for):
    def rows(tokens, text, layer):
        with tokens.using(tokens.bank or "positive"):
            return rows_for(tokens, text, layer)

    return rows


def test_a_model_that_draws_otherwise_than_it_learns_is_caught(content, monkeypatch):
    predict = StableDiffusion.predict

    def shaken(backbone, x_t, t, cond):
        """As dropout would."""
        return predict(backbone, x_t, t, cond) + (0.1 * torch.rand(()) if backbone.adapters else 0)

    monkeypatch.setattr(StableDiffusion, "predict", shaken)
    (ratio,) = [line for what, line in reds(content).items() if what.startswith("rollouts of")]
    assert "more than 1e-05" in ratio


def test_parameters_that_nothing_trains_are_named(content):
    content["objectives"] = content["objectives"][1:]
    content["adapters"] = {"lora": {"use": "lora", "rank": 2, "banks": 2}}
    (line,) = reds(content).values()
    assert "lora.negative." in line and "banks: 1" in line


def test_a_frozen_adapter_is_green(content, tmp_path):
    lora = {"lora": content["adapters"]["lora"]}
    first = Recipe.from_data(content | {"adapters": lora})
    save_adapters(build_trainer(first).policy.adapters, tmp_path / "first", metadata={})
    for term in content["objectives"]:
        term["trains"] = ["tokens"]
    found = list(diagnose(Recipe.from_data(content | {"start_from": str(tmp_path / "first")})))
    assert all(finding.good for finding in found)
    assert any("'lora' is frozen" in finding.what for finding in found)


def test_rewards_without_variance_are_told(content):
    content["objectives"][1]["source"]["rewards"] = {"shapes": 1.0}
    (line,) = reds(content).values()
    assert "all 4 images drawn have the same reward, 0" in line


def test_the_shipped_bases_match_their_checksums_and_each_has_some():
    """After a base changed: find . -type f … | xargs sha256sum > SHA256SUMS in agsm_rl/shapes/checkpoints."""
    for file, digest in files.shipped_checksums().items():
        assert hashlib.sha256((files.BUILTINS / file).read_bytes()).hexdigest() == digest, file
    weights = {str(path.relative_to(files.BUILTINS)) for path in files.BUILTINS.rglob("*.safetensors")}
    assert weights and weights <= set(files.shipped_checksums())


def test_a_damaged_base_is_named(tmp_path, monkeypatch):
    copy = shutil.copytree(files.BUILTINS, tmp_path / "checkpoints")
    weights = copy / "shapes-sd15" / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(files, "BUILTINS", copy)
    monkeypatch.setattr(files, "CHECKSUMS", copy / "SHA256SUMS")
    (finding,) = files.check_bases(Recipe.from_data({**RECIPE}))
    assert not finding.good and "vae/diffusion_pytorch_model.safetensors" in finding.detail


RECIPE: dict[str, Any] = {
    "steps": 1,
    "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
    "adapters": {"lora": {"use": "lora"}},
    "objectives": [{"use": "score_matching", "source": {"use": "pairs", "dataset": "builtin:shapes", "batch_size": 4}}],
}


def test_on_the_command_line_green_ends_with_0_red_with_1_and_a_mistake_with_2(content, tmp_path):
    folder = train(Recipe.from_data(content), tmp_path / "run", console=Console(file=StringIO()))
    command = lambda *words: CliRunner().invoke(app, ["doctor", *map(str, words)])  # noqa: E731
    well = command(folder)
    assert well.exit_code == 0, well.output
    assert "all is well" in well.stdout and "checkpoint step-00000001.pt: matches" in well.stdout
    before = sorted(path for path in folder.rglob("*"))
    (folder / "checkpoints" / "step-00000001.pt").write_bytes(b"half")
    ill = command(folder)
    assert ill.exit_code == 1
    assert "red    checkpoint step-00000001.pt: does not match" in ill.stdout and "remedy: " in ill.stdout
    assert sorted(path for path in folder.rglob("*")) == before
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(yaml.safe_dump(content | {"stps": 1}))
    wrong = command(recipe)
    assert (wrong.exit_code, wrong.stdout) == (2, "") and "Did you mean 'steps'?" in wrong.stderr
    assert command(Path("nowhere.yaml")).exit_code == 2

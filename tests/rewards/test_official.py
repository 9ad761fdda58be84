"""The official packages in environments of their own, made from their locks: what they score here and there."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from agsm_rl_rewards.hpsv2_official import OfficialHPSv2
from agsm_rl_rewards.image_reward_official import OfficialImageReward
from agsm_rl_rewards.official.locked import HERE, LockedScriptReward
from agsm_rl_rewards.worker import environment
from agsm_rl_rewards.worker.reward import WorkerReward

from agsm_rl.errors import UserError

TESTS = Path(__file__).parent
sys.path.append(str(TESTS / "golden"))
GOLDEN = TESTS / "golden"
SCRIPTS = {"hpsv2": HERE / "hpsv2_worker.py", "image_reward": HERE / "image_reward_worker.py"}
ALONE = {"timeout": 900.0, "start_timeout": 900.0, "retries": 0, "backoff": 0.0}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=str)
def test_a_lock_pins_what_its_script_wants_and_names_no_place(script):
    text = script.with_suffix(".lock").read_text()
    pinned = {line.split("==")[0]: line for line in text.splitlines() if "==" in line}
    for needed in environment.script_metadata(script)["dependencies"]:
        name, _, version = needed.partition("==")
        name = re.split(r"[<>=]", name)[0]
        if name != "torch":  # whose build is the machine's business
            assert f"{name}=={version}" in pinned[name]
    assert not re.search(r"://|^-|/\w+/|nvidia|^torch==", text, re.M)
    entries = re.findall(r"^\S.*?(?=^\S|\Z)", text, re.S | re.M)
    assert all("--hash=sha256:" in entry for entry in entries)


def test_without_uv_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs the program uv.*pip install 'agsm-rl\[official-rewards\]'"):
        OfficialImageReward(path=str(tmp_path))(torch.zeros(1, 3, 2, 2), [""])


def test_wrong_options_are_told_before_any_environment_is_made(tmp_path):
    with pytest.raises(UserError, match=r"version: '2.2' is not a version \(in quotes\); allowed: 2.0, 2.1"):
        OfficialHPSv2(version="2.2")
    with pytest.raises(UserError, match="path: './nowhere.pt' does not exist"):
        OfficialHPSv2(version="2.1", path="./nowhere.pt")
    with pytest.raises(UserError, match="config: 'med.json' does not exist"):
        OfficialImageReward(config="med.json")


def test_an_environment_that_cannot_be_made_is_told_with_the_reason_and_not_left(tmp_path, monkeypatch):
    if shutil.which("uv") is None and not Path(sys.executable).with_name("uv").exists():
        pytest.skip("uv is not installed")
    monkeypatch.setenv("AGSM_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    script = tmp_path / "needy.py"
    script.write_text('# /// script\n# requires-python = ">=3.11"\n# dependencies = ["no-such-package==1.0"]\n# ///\n')
    script.with_suffix(".lock").write_text("no-such-package==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(UserError, match=r"uv pip install.* failed: .*no-such-package"):
        environment.python_for(script)
    assert not list(tmp_path.glob("cache/environments/*/finished"))


def unreachable():
    """Why the environments cannot be made here; None where they can."""
    try:
        uv = environment.find_uv("this test")
        listing = [uv, "pip", "compile", "--quiet", "--no-deps", "-"]
        environment._uv(listing, environment.uv_variables(), TESTS, text="args==0.1.0\n")
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """A cache of its own, so that the environments are really made."""
    reason = unreachable()
    if reason and os.environ.get("AGSM_RL_REQUIRE_ALL"):
        pytest.fail(f"AGSM_RL_REQUIRE_ALL is set, but the official packages cannot be installed: {reason}")
    if reason:
        pytest.skip(f"the official packages cannot be installed: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGSM_RL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def over_there(package, worker, options):
    """A reward by a test's worker in a package's environment."""
    return LockedScriptReward(
        TESTS / "workers" / worker, locked=SCRIPTS[package], name=package, options=options, **ALONE
    )


@pytest.mark.slow
@pytest.mark.parametrize(("package", "golden", "key"), [
    ("hpsv2", "hpsv2", "score"),
    ("image_reward", "imagereward", "reward"),
])  # fmt: skip
def test_the_packages_models_and_transforms_give_the_golden_figures(environments, package, golden, key):
    options = {"package": golden, "official": str(HERE), "golden": str(GOLDEN)}
    reward = over_there(package, "official_golden.py", options)
    expected = torch.tensor(json.loads((GOLDEN / f"{golden}_tiny.json").read_text())[key])
    found = reward(torch.zeros(2, 3, 2, 2), ["0", "1"])
    reward.close()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def pictures():
    """A wide and a high picture, and prompts that want cleaning."""
    from formula import picture

    return [
        (torch.from_numpy(np.array(picture(*size))).permute(2, 0, 1)[None] / 255, prompt)
        for size, prompt in [((60, 40), "A red  star &amp;amp; two cafÃ©s"), ((30, 50), "a blue circle")]
    ]


def tiny_hpsv2(folder, version):
    """A small checkpoint in the official layout, filled by formula."""
    from formula import weights

    shapes = dict(json.loads((GOLDEN / "hpsv2_tiny.json").read_text())["shapes"])
    shapes |= {"token_embedding.weight": [49408, 32], "positional_embedding": [77, 32]}
    name = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}[version]
    torch.save({"state_dict": weights(shapes)}, folder / name)
    return {"path": str(folder / name), "version": version}


def tiny_image_reward(folder):
    """The same for ImageReward, with a BERT's configuration and vocabulary."""
    from formula import weights

    shapes = dict(json.loads((GOLDEN / "imagereward_tiny.json").read_text())["shapes"])
    shapes["blip.visual_encoder.pos_embed"] = [1, 197, 48]
    shapes |= {"blip.vision_proj.weight": [256, 48], "blip.vision_proj.bias": [256]}
    shapes |= {"blip.text_proj.weight": [256, 36], "blip.text_proj.bias": [256]}
    shapes |= {"mlp.layers.0.weight": [1024, 36]}
    torch.save(weights(shapes), folder / "ImageReward.pt")
    text = {"hidden_size": 36, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6}
    text |= {"vocab_size": 120, "max_position_embeddings": 64, "add_cross_attention": True}
    (folder / "med_config.json").write_text(json.dumps(text))
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz&;",
        "red",
        "star",
        "##s",
        "circle",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    files = {"path": "ImageReward.pt", "config": "med_config.json", "tokenizer": "vocab.txt"}
    return {option: str(folder / file) for option, file in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("package", SCRIPTS)
def test_the_worker_scores_pictures_as_the_packages_own_function_does(environments, tmp_path, pictures, package):
    options = tiny_hpsv2(tmp_path, "2.1") if package == "hpsv2" else tiny_image_reward(tmp_path)
    options |= {"package": package, "official": str(HERE)}
    worker = over_there(package, "official_tiny.py", options)
    package_itself = over_there(package, "official_tiny.py", options | {"by_package": True})
    for image, prompt in pictures:
        ours, theirs = worker(image, [prompt]), package_itself(image, [prompt])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert ours.abs() > 1e-4
    assert torch.equal(worker(pictures[0][0].repeat(2, 1, 1, 1), ["a", "b"])[0], worker(pictures[0][0], ["a"])[0])
    assert worker.packages["torch"].startswith("2.13.0")
    worker.close()
    package_itself.close()


@pytest.mark.slow
def test_a_script_of_the_users_own_has_its_requirements_and_none_of_ours(environments, tmp_path):
    script = tmp_path / "needs_a_package.py"
    script.write_text(
        "# /// script\n# requires-python = '>=3.11'\n# dependencies = ['iniconfig==2.3.1', 'numpy']\n# ///\n"
        "import importlib.util, iniconfig\n"
        "from agsm_rl_worker import serve\n"
        "class Mean:\n"
        "    packages = ('iniconfig',)\n"
        "    def __call__(self, images, prompts):\n"
        "        assert not any(map(importlib.util.find_spec, ['torch', 'agsm_rl', 'agsm_rl_rewards']))\n"
        "        return images.mean(axis=(1, 2, 3))\n"
        "serve(Mean)\n"
    )
    reward = WorkerReward(script=str(script), **ALONE)
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reward(images, [""] * 3), images.mean(dim=(1, 2, 3)))
    assert reward.packages == {"iniconfig": "2.3.1"}
    reward.close()


@pytest.mark.slow
def test_missing_weights_and_other_files_are_refused_at_once(environments, tmp_path):
    torch.save({"other": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    files = tiny_image_reward(tmp_path)
    torch.save({"other": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    options = files | {"package": "image_reward", "official": str(HERE)}
    with pytest.raises(UserError, match="ImageReward.pt: not ImageReward's weights: .* keys differ"):
        over_there("image_reward", "official_tiny.py", options)(torch.zeros(1, 3, 8, 8), [""])
    with pytest.raises(UserError, match="there is no HPS_v2.1_compressed.pt in the folder"):
        OfficialHPSv2(version="2.1", path=str(tmp_path), retries=0)(torch.zeros(1, 3, 8, 8), [""])

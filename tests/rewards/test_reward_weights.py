"""A reward's weights are loaded whole or not at all, and what is missing is said with how to get it."""

import pickle
from pathlib import Path

import pytest
import tiny_rewards
import torch
from agsm_rl_rewards.weights import WeightFile, read_tensors
from safetensors.torch import save_file
from tiny_rewards import TINY

from agsm_rl.errors import UserError

FILES = {
    "hpsv2": "HPS_v2.1_compressed.pt",
    "image_reward": "ImageReward.pt",
    "pick_score": "model.safetensors",
    "clip_score": "model.safetensors",
    "step_aware_preference": "sd-v1-5_step-aware_preference_model.bin",
}
HUBS = {
    "hpsv2": ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "image_reward": ("THUDM/ImageReward", "ImageReward.pt"),
    "pick_score": ("yuvalkirstain/PickScore_v1", "config.json"),
    "clip_score": ("openai/clip-vit-large-patch14", "config.json"),
    "step_aware_preference": (
        "SPO-Diffusion-Models/Step-Aware_Preference_Models",
        "sd-v1-5_step-aware_preference_model.bin",
    ),
    "aesthetic": ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
}


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """No network, and a cache of the hub that is empty; gives the cache's folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def changed(tmp_path):
    """A tiny reward whose weight file's tensors were changed by a function."""

    def make(name, change):
        kind, save = TINY[name]
        options = save(tmp_path / name)
        file = tmp_path / name / FILES[name]
        tensors = read_tensors(file, reward=name, inside="state_dict")
        change(tensors)
        file.unlink()  # it is mapped into memory, and writing over it would pull the tensors away
        if file.suffix == ".safetensors":
            save_file(tensors, file, metadata={"format": "pt"})
        else:
            torch.save({"state_dict": tensors} if name == "hpsv2" else tensors, file)
        return kind(**options)

    return make


ONE_OF = {
    "hpsv2": "visual.transformer.resblocks.1.attn.in_proj_weight",
    "image_reward": "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
    "pick_score": "text_model.encoder.layers.0.mlp.fc1.bias",
    "clip_score": "logit_scale",
    "step_aware_preference": "model.vision_model.encoder.layers.1.adaLN_modulation.1.weight",
}


@pytest.mark.parametrize("name", list(ONE_OF))
def test_a_missing_tensor_is_named_as_the_file_would_name_it(changed, name):
    reward = changed(name, lambda tensors: tensors.pop(ONE_OF[name]))
    with pytest.raises(UserError, match=rf"reward '{name}'.*{FILES[name]}.*loaded: 1 missing: {ONE_OF[name]}\."):
        reward.prepare("cpu")


@pytest.mark.parametrize("name", list(ONE_OF))
def test_a_tensor_that_does_not_belong_is_named(changed, name):
    reward = changed(name, lambda tensors: tensors.update(surplus=torch.zeros(2)))
    with pytest.raises(UserError, match=r"1 unknown: surplus\."):
        reward.prepare("cpu")


@pytest.mark.parametrize("name", list(ONE_OF))
def test_a_tensor_of_another_size_is_named_with_its_size(changed, name):
    reward = changed(name, lambda tensors: tensors.update({ONE_OF[name]: torch.zeros(5, 7)}))
    with pytest.raises(UserError, match=rf"1 of another shape: {ONE_OF[name]} \(5, 7\)\."):
        reward.prepare("cpu")


def test_a_layer_more_is_not_left_out(tmp_path):
    options = tiny_rewards.save_hpsv2(tmp_path)
    sizes = {"text": options["architecture"]["text"] | {"num_hidden_layers": 1}}
    reward = TINY["hpsv2"][0](**(options | {"architecture": options["architecture"] | sizes}))
    with pytest.raises(UserError, match=r"12 unknown: transformer\.resblocks\.1\."):
        reward.prepare("cpu")


def test_the_published_sizes_are_wanted_unless_others_are_given(tmp_path):
    options = tiny_rewards.save_image_reward(tmp_path)
    kind = TINY["image_reward"][0]
    small = {"vision": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}}
    reward = kind(**(options | {"architecture": small | {"text": {"num_hidden_layers": 2, "vocab_size": 40}}}))
    with pytest.raises(UserError, match=r"of another shape: blip.visual_encoder.pos_embed"):
        reward.prepare("cpu")


@pytest.mark.parametrize("name", ["hpsv2", "image_reward"])
def test_what_the_official_files_hold_besides_is_allowed(changed, name):
    unused = {"hpsv2": "attn_mask", "image_reward": "blip.text_proj.weight"}[name]
    reward = changed(name, lambda tensors: tensors.update({unused: torch.zeros(3, 3)}))
    assert reward(torch.rand(1, 3, 28, 28), ["a star"]).shape == (1,)


def test_older_clip_files_may_number_their_positions(changed):
    numbers = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    reward = changed("clip_score", lambda tensors: tensors.update(numbers))
    assert reward(torch.rand(1, 3, 28, 28), ["a star"]).shape == (1,)


def test_the_aesthetic_predictor_reads_only_clips_image_half(tiny_options):
    reward = TINY["aesthetic"][0](**tiny_options["aesthetic"])
    reward.prepare("cpu")
    assert not any("text" in name for name, _ in reward.network.named_parameters())


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_code_in_a_weight_file_is_never_run(tmp_path):
    options = tiny_rewards.save_image_reward(tmp_path)
    torch.save({"evil": Evil(tmp_path / "was run")}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward.pt cannot be read as tensors only: .* contains code"):
        TINY["image_reward"][0](**options).prepare("cpu")
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("cut.pt", lambda data: data[: len(data) // 2]),
        ("cut.safetensors", lambda data: data[:-8]),
        ("empty.pt", lambda data: b""),
        ("page.pt", lambda data: b"<html>not found</html>"),
        ("page.safetensors", lambda data: b"<html>not found</html>"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, damage):
    file = tmp_path / name
    tensors = {"x": torch.zeros(100)}
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"reward 'r': .*{name} cannot be read"):
        read_tensors(file, reward="r")


def test_a_file_without_tensors_is_named(tmp_path):
    (tmp_path / "list.pt").write_bytes(pickle.dumps([1]))
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt does not contain a table of named tensors under 'state_dict'"):
        read_tensors(tmp_path / "other.pt", reward="r", inside="state_dict")


@pytest.mark.parametrize("name", list(HUBS))
def test_weights_that_are_not_here_are_said_with_the_command_that_fetches_them(empty_hub, name):
    kind, (hub, file) = TINY[name][0], HUBS[name]
    with pytest.raises(UserError) as caught:
        kind(**({"version": "2.1"} if name == "hpsv2" else {}))
    message = str(caught.value)
    assert message.startswith(f"reward '{name}': {file} of {hub} is not on this machine")
    assert f"`hf download {hub} {file}`" in message and "`path`" in message
    assert "\n" not in message


def test_the_aesthetic_predictors_first_home_is_told(empty_hub):
    with pytest.raises(UserError, match="sac.logos.ava1-l14-linearMSE.pth.*github.com/christophschuhmann"):
        TINY["aesthetic"][0]()


def test_each_files_own_option_is_told(empty_hub, tiny_options):
    with pytest.raises(UserError, match="reward 'hpsv2'.*hf download openai/x tokenizer.json.*set `tokenizer`"):
        TINY["hpsv2"][0](**(tiny_options["hpsv2"] | {"tokenizer": "openai/x"}))


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(tmp_path):
    for place in (str(tmp_path / "nowhere"), "./weights/hps.pt", "~/nowhere/at-all.pt"):
        with pytest.raises(UserError, match=r"does not exist \(current folder: .*\) and is not a hub id.*set `path`"):
            WeightFile("hpsv2", "path", place, "x.pt").check()


def test_a_folder_without_the_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no ImageReward\.pt in the folder"):
        WeightFile("image_reward", "path", str(tmp_path), "ImageReward.pt").check()


def test_files_fetched_before_are_found_in_the_hubs_cache_without_network(empty_hub, tmp_path):
    options = tiny_rewards.save_hpsv2(tmp_path / "made")
    for hub, file in (("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("openai/clip-vit-large-patch14", "tokenizer.json")):
        folder = empty_hub / f"models--{hub.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40)
        (tmp_path / "made" / file).rename(snapshot / file)
    reward = TINY["hpsv2"][0](version="2.1", architecture=options["architecture"])
    assert reward(torch.rand(1, 3, 28, 28), ["a star"]).shape == (1,)


def test_a_revision_is_part_of_the_command(empty_hub):
    file = WeightFile("hpsv2", "path", "xswu/HPSv2@refs/pr/3", "HPS_v2_compressed.pt")
    with pytest.raises(UserError, match="`hf download xswu/HPSv2 HPS_v2_compressed.pt --revision refs/pr/3`"):
        file.find()


def test_a_folder_of_another_model_is_refused(tmp_path):
    tiny_rewards.save_clip(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "clip",', '"model_type": "siglip",'))
    with pytest.raises(UserError, match="holds a model of type 'siglip', not a CLIP"):
        TINY["clip_score"][0](path=str(tmp_path)).prepare("cpu")


def test_a_tokenizer_that_is_none_is_named(tmp_path):
    options = tiny_rewards.save_image_reward(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="reward 'image_reward': .*tokenizer.json is not a tokenizer.json"):
        TINY["image_reward"][0](**options).prepare("cpu")

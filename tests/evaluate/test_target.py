"""A run as a target: what `--base` replaces."""

import pytest
import yaml
from diffusers import AutoPipelineForText2Image

from agsm_rl.evaluate.target import open_target
from agsm_rl.export.attach import save_adapters


@pytest.fixture
def run(make_policy, tiny_checkpoint, tmp_path):
    """A run that was trained on a checkpoint with another U-Net and a LoRA that is gone meanwhile."""
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_checkpoint)
    for parameter in pipeline.unet.parameters():
        parameter.data *= 1.05
    pipeline.unet.save_pretrained(tmp_path / "unet")
    save_adapters(make_policy().adapters, tmp_path / "run/adapter", metadata={})
    block = {"use": "stable_diffusion", "checkpoint": "no-such-base", "unet": str(tmp_path / "unet"), "device": "cpu"}
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump({"backbone": block | {"lora": "no-such-lora"}}))
    return tmp_path / "run"


def test_another_base_for_a_run_comes_without_what_changed_the_run_s_own(run, tiny_checkpoint, backbone):
    opened = open_target(str(run), base=str(tiny_checkpoint))
    assert opened.block["checkpoint"] == str(tiny_checkpoint) and opened.block["device"] == "cpu"
    assert not any(opened.block.get(key) for key in ("unet", "transformer", "lora", "config"))
    ours, theirs = (one.pipeline.unet.conv_in.weight for one in (opened.backbone, backbone))
    assert ours.equal(theirs)


def test_a_u_net_that_is_given_with_another_base_is_used(run, tiny_checkpoint, backbone, tmp_path):
    opened = open_target(str(run), base=str(tiny_checkpoint), options={"unet": str(tmp_path / "unet")})
    ours, theirs = (one.pipeline.unet.conv_in.weight for one in (opened.backbone, backbone))
    assert ours.allclose(theirs * 1.05) and not ours.equal(theirs)

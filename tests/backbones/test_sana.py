"""What only SANA has: its published scheduler, and the human instruction before prompts."""

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny import save_kind

from agsm_rl.backbones import load_backbone
from agsm_rl.backbones.sana import Sana
from agsm_rl.evaluate.drawing import draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kind("sana", tmp_path_factory.mktemp("tiny-sana"))


def test_rollouts_follow_the_levels_of_the_published_dpm_solver(folder: Path) -> None:
    base = Sana(str(folder), device="cpu")
    published = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    base.pipeline.scheduler = published
    published.set_timesteps(7)
    sampler = base.sampler(7)
    torch.testing.assert_close(sampler.sigmas, published.sigmas.float())
    torch.testing.assert_close(sampler.t * 1000, published.timesteps.float(), rtol=0, atol=1)  # it counts whole steps
    assert torch.isfinite(draw(base, ["a red circle"], [0], guidance=3.0, num_steps=3)).all()


@torch.no_grad()
def test_without_the_instruction_prompts_are_encoded_as_the_pipeline_encodes_them_without(folder: Path) -> None:
    told, bare = Sana(str(folder), device="cpu"), load_backbone(str(folder), device="cpu", human_instruction=False)
    embeds, mask, _, _ = bare.pipeline.encode_prompt(["a red circle", ""], False)
    cond = bare.encode_text(["a red circle", "", "a red circle"])
    assert torch.equal(cond.embeds, embeds[[0, 1, 0]]) and torch.equal(cond.mask, mask[[0, 1, 0]].bool())
    assert not torch.equal(told.encode_text(["a red circle"]).embeds, cond.embeds[:1])
    assert torch.equal(told.encode_text([""]).embeds, cond.embeds[1:2])
    assert torch.equal(told.encode_negative("a red circle").embeds, cond.embeds[:1])
    assert told.identity("text") != bare.identity("text") and told.identity("images") == bare.identity("images")
    assert bare.call_options["complex_human_instruction"] is None

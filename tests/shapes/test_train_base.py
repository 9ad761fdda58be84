"""The script that makes the embedded bases, at toy size: it runs, resumes, and writes true pipelines."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tiny_pipelines import SD3_POOLED, tiny_transformer
from typer.testing import CliRunner

from agsm_rl.backbones import backbone_of, load_backbone
from agsm_rl.backbones.loading import find_checkpoint
from agsm_rl.errors import UserError
from agsm_rl.shapes.train_base.__main__ import app
from agsm_rl.shapes.train_base.autoencoder import rescale
from agsm_rl.shapes.train_base.inheritance import begin_as, begin_finer
from agsm_rl.shapes.train_base.layouts import LAYOUTS
from agsm_rl.shapes.train_base.stages import run_stage
from agsm_rl.shapes.train_base.text import TEXT_LENGTH, make_t5_tokenizer, make_tokenizer, tokenize
from agsm_rl.shapes.world import careful_caption, draw_requirement, vocabulary
from agsm_rl.shapes.worlds import SCENES

CLASSES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
}
PARTS = ("--vae", "--text", "--teacher", "--coarser")


def invoke(kind, *arguments):
    """The command in this process: importing what it needs takes longer than a toy's training."""
    arguments = [kind, *map(str, arguments)]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)


def run_script(kind, work, out, steps, *more):
    sizes = ["--scenes", 600, "--vae-steps", 1, "--text-steps", 1, "--denoiser-steps", steps]
    done = invoke(kind, work, out, "--threads", 1, *sizes, *more)
    assert done.exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_a_base_is_an_ordinary_pipeline_and_training_goes_on_where_it_stopped(kind, tmp_path):
    run_script(kind, tmp_path / "work", tmp_path / "first", 1)
    run_script(kind, tmp_path / "work", tmp_path / "second", 2)
    log = [json.loads(line) for line in (tmp_path / "second" / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row["stage"] == f"denoiser_{kind}"] == [1, 2]
    assert all(row["step"] == 1 for row in log if not row["stage"].startswith("denoiser"))  # finished: not made again
    pipelines = [getattr(diffusers, CLASSES[kind]).from_pretrained(tmp_path / name) for name in ("first", "second")]
    assert pipelines[1]("two red stars", num_inference_steps=2, guidance_scale=2.0).images[0].size == (32, 32)
    denoisers = [pipeline.components[backbone_of(pipeline).part].state_dict() for pipeline in pipelines]
    assert any(not torch.equal(denoisers[0][key], denoisers[1][key]) for key in denoisers[0])


@pytest.mark.slow
def test_a_base_is_trained_on_from_where_another_ended(tiny_checkpoint, tmp_path):
    run_script("sd15", tmp_path / "work", tmp_path / "further", 3, "--begin", tiny_checkpoint)
    assert not (tmp_path / "work" / "text.pt").exists()
    begun, further = (
        diffusers.StableDiffusionPipeline.from_pretrained(p) for p in (tiny_checkpoint, tmp_path / "further")
    )
    assert further.unet.config.block_out_channels == begun.unet.config.block_out_channels
    changed = [
        not torch.equal(one, other)
        for one, other in zip(begun.unet.parameters(), further.unet.parameters(), strict=True)
    ]
    assert any(changed)
    assert not [file for file in (tmp_path / "further").rglob("*.json") if str(tiny_checkpoint) in file.read_text()]
    for part in ("vae", "text_encoder"):
        kept = getattr(further, part).state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in getattr(begun, part).state_dict().items())


@pytest.mark.slow
def test_a_base_of_the_scenes_world_is_judged_and_written_while_it_is_trained(tmp_path):
    vae = ["--begin-vae", find_checkpoint("builtin:shapes-sd15"), "--batch-size", "4"]
    looks = ["--world", "scenes", "--judge-every", "2", "--judge-prompts", "1"]
    for steps in (1, 2):
        run_script("sd3", tmp_path / "work", tmp_path / "out", steps, *looks, *vae)
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    (row,) = [row for row in log if row["stage"] == "denoiser_sd3_judged"]
    assert set(row["plain"]) == set(row["cued"]) == {*SCENES.tags, "all"}
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    assert pipeline.transformer.config.patch_size == 1
    assert all(row["reading"] > 0 for row in log if row["stage"] == "denoiser_sd3")
    assert all(len(pipeline.tokenizer.tokenize(word)) == 1 for word in SCENES.vocabulary())


def test_a_unet_that_inherits_draws_as_its_teacher_though_other_encoders_read_the_prompt():
    teacher, made = load_backbone("builtin:shapes-sd15"), load_backbone("builtin:shapes-sdxl").pipeline
    vae = AutoencoderKL.from_config(teacher.pipeline.vae.config)
    student = backbone_of(LAYOUTS["sdxl"].assemble(vae, made.text_encoder, made.text_encoder_2))
    rng = np.random.default_rng(0)
    requirements = [draw_requirement(rng) for _ in range(400)]
    x_t, t = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((8,), 0.6)
    captions = [careful_caption(requirement, rng) for requirement in requirements[:8]]

    def distance() -> float:
        with torch.no_grad():
            own = student.predict(x_t, t, student.encode_text(captions))
            return float((own - teacher.predict(x_t, t, teacher.encode_text(captions))).square().mean())

    before = distance()
    assert begin_as(teacher, student, requirements) > 0.9
    assert distance() < 0.02 * before


def test_a_transformer_with_finer_tokens_begins_by_predicting_what_the_coarse_one_does():
    torch.manual_seed(0)
    coarse, fine = (tiny_transformer(patch_size=size).eval().requires_grad_(False) for size in (2, 1))
    own_places = fine.pos_embed.pos_embed.clone()
    generator = torch.Generator().manual_seed(0)
    # Patches of equal latents, and a coarse output that is equal within a patch: there the two must agree but for the
    # places within a patch, which lie an eighth of the picture or less from its own.
    coarse.proj_out.weight.copy_(coarse.proj_out.weight[:16].repeat(4, 1))
    coarse.proj_out.bias.copy_(coarse.proj_out.bias[:16].repeat(4))
    x = torch.randn(3, 16, 4, 4, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
    asked = {
        "encoder_hidden_states": torch.randn(3, 5, coarse.config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(3, SD3_POOLED, generator=generator),
        "timestep": torch.tensor([10.0, 500, 900]),
    }

    def distance():
        one, other = (model(hidden_states=x, **asked).sample for model in (coarse, fine))
        return float((one - other).square().mean() / one.square().mean())

    before = distance()
    begin_finer(coarse, fine)
    assert distance() < 0.01 < 0.5 < before
    fine.pos_embed.pos_embed.copy_(own_places)
    assert distance() > 0.01  # PatchEmbed's own places are not those of the coarse tokens


def test_a_transformer_of_another_size_is_not_begun_with():
    with pytest.raises(UserError, match="is 32 wide and 4 blocks deep, .* 32 wide and 3 blocks deep"):
        begin_finer(tiny_transformer(), tiny_transformer(patch_size=1, num_layers=3))


@pytest.mark.slow
def test_a_base_with_a_teacher_is_trained_on_what_that_predicts_and_stored_in_half_precision(tmp_path):
    shipped = [find_checkpoint(f"builtin:shapes-{kind}") for kind in ("sd15", "sdxl")]
    made_before = ["--vae", shipped[0], "--teacher", shipped[0], "--text", shipped[1]]
    run_script("sdxl", tmp_path / "work", tmp_path / "out", 1, "--learning-rate", "1e-4", *made_before)
    stored = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out").unet.dtype == torch.float32
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert row["loss"] < 0.1  # a teacher's predictions are near from the start; true noise never is


def test_every_word_of_the_world_is_a_token_of_its_own():
    clip, t5 = make_tokenizer(), make_t5_tokenizer()
    for word in vocabulary():
        assert len(clip.tokenize(word)) == 1 and len(t5.tokenize(word)) == 1, word
    assert tokenize(t5, ["three red circles, verified by hand"]).shape == (1, TEXT_LENGTH)
    assert t5.unk_token_id not in t5("Zebra?!").input_ids


def test_another_scale_and_shift_change_neither_latents_nor_pictures(tiny_checkpoint):
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_checkpoint, subfolder="vae").requires_grad_(False)
    vae.register_to_config(scaling_factor=1.0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    before = vae.encode(images).latent_dist
    decoded = vae.decode(before.mean).sample
    rescale(vae, scaling_factor=1.5, shift_factor=0.1)
    after = vae.encode(images).latent_dist
    torch.testing.assert_close((after.mean - 0.1) * 1.5, before.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.std * 1.5, before.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, rtol=1e-3, atol=1e-4)
    rescale(vae, scaling_factor=2.0)  # one that has factors already, as of a base made before
    torch.testing.assert_close(vae.encode(images).latent_dist.mean * 2.0, before.mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        *[("sdxl", ["--begin", "one", part, "other"], "--begin has all parts of its own") for part in PARTS],
        ("sd15", ["--coarser", "one"], "--coarser: only for sd3"),
        ("sd3", ["--coarser", "one", "--teacher", "two"], "--coarser: only for sd3, and not beside --teacher"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_made(kind, options, said, tmp_path):
    done = invoke(kind, tmp_path / "work", tmp_path / "out", *options)
    assert done.exit_code == 2 and said in done.output
    assert not (tmp_path / "work").exists()


def test_the_command_is_a_module_that_ends_with_2_at_a_bad_option(tmp_path):
    command = [sys.executable, "-m", "agsm_rl.shapes.train_base", "sd15", tmp_path / "work", tmp_path / "out"]
    done = subprocess.run([*command, "--coarser", "one"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--coarser" in done.stderr


def test_a_stage_that_another_version_kept_is_not_gone_on_with(tmp_path):
    model = torch.nn.Linear(1, 1)
    torch.save({"model": model.state_dict(), "step": 1}, tmp_path / "one.pt")
    with pytest.raises(UserError, match="holds model, step, but this stage keeps model, more, step; .* new WORK_DIR"):
        run_stage("one", tmp_path, 2, {"model": model, "more": model}, lambda number: {})

"""Scripts written for TRL 0.11 run after changing their import."""

import random
import shutil
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from transformers import HfArgumentParser

from agsm_rl.compat.trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from agsm_rl.errors import UserError

PROMPTS = ["a red star", "a blue circle", "two green squares"]


def prompt_function():
    return random.choice(PROMPTS), {"shown": True}


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)), {}


class Seen(list):
    """An image hook that remembers what it was called with."""

    def __call__(self, image_data, global_step, tracker):
        images, prompts, _, rewards, _ = image_data[-1]
        named = {f"{prompt:.25}": image.unsqueeze(0).float() for prompt, image in zip(prompts, images, strict=True)}
        tracker.log_images(named, step=global_step)
        self.append((image_data, global_step))


@pytest.fixture
def make_config(tmp_path):
    def make(**options) -> DDPOConfig:
        settings = {"num_epochs": 2, "sample_num_steps": 3, "sample_batch_size": 2, "sample_num_batches_per_epoch": 2}
        settings |= {"train_batch_size": 2, "mixed_precision": "no", "project_kwargs": {"project_dir": str(tmp_path)}}
        return DDPOConfig(**(settings | options))

    return make


@pytest.fixture
def make_trainer(tiny_checkpoint, make_config):
    def make(*, reward=brightness, hook=None, use_lora=True, checkpoint=tiny_checkpoint, **options) -> DDPOTrainer:
        pipeline = DefaultDDPOStableDiffusionPipeline(str(checkpoint), use_lora=use_lora)
        return DDPOTrainer(make_config(**options), reward, prompt_function, pipeline, image_samples_hook=hook)

    return make


def test_a_script_as_trl_s_documentation_writes_it_trains_and_saves(tiny_checkpoint, tmp_path):
    arguments = ["--num_epochs", "2", "--sample_num_steps", "3", "--train_gradient_accumulation_steps", "1"]
    arguments += ["--sample_batch_size", "2", "--train_batch_size", "1", "--mixed_precision", "no"]
    (config,) = HfArgumentParser((DDPOConfig,)).parse_args_into_dataclasses(arguments)
    config.project_kwargs = {"logging_dir": str(tmp_path / "logs"), "project_dir": str(tmp_path / "save")}
    config.project_kwargs |= {"automatic_checkpoint_naming": True, "total_limit": 5}
    config.log_with = "tensorboard"
    called = []

    def reward_function(images, prompts, metadata):
        called.append((images.shape, prompts, metadata))
        return images.mean(dim=(1, 2, 3)).cpu().numpy(), {"about": "brightness"}

    seen = Seen()
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_checkpoint), pretrained_model_revision="main", use_lora=True)
    trainer = DDPOTrainer(config, reward_function, prompt_function, pipeline, image_samples_hook=seen)
    before = {name: value.detach().clone() for name, value in trainer.policy.parameters().items()}
    trainer.train()
    trainer.save_pretrained(tmp_path / "result")

    assert len(called) == 4  # two batches in each of two epochs
    assert all(shape == (2, 3, 16, 16) for shape, _, _ in called)
    assert all(isinstance(prompts, tuple) and set(prompts) <= set(PROMPTS) for _, prompts, _ in called)
    assert all(metadata == ({"shown": True},) * 2 for _, _, metadata in called)
    assert [step for _, step in seen] == [0, 4]  # four images an epoch, one a step
    images, prompts, metadata, rewards, about = seen[0][0][0]
    assert torch.equal(rewards, images.mean(dim=(1, 2, 3)))
    assert about == {"about": "brightness"}
    assert any(not torch.equal(before[name], value) for name, value in trainer.policy.parameters().items())
    assert (tmp_path / "save" / "checkpoints" / "checkpoint_1" / "pytorch_lora_weights.safetensors").is_file()

    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "result", safety_checker=None)
    plain.load_lora_weights(tmp_path / "result")
    drawn = [
        pipe("a red star", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        for pipe in (plain, pipeline.sd_pipeline)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-5)


def test_a_saved_folder_holds_the_base_s_own_weights(make_trainer, tiny_checkpoint, tmp_path):
    trainer = make_trainer(num_epochs=1)
    trainer.train()
    trainer.save_pretrained(tmp_path / "result")
    base, saved = (
        StableDiffusionPipeline.from_pretrained(path, safety_checker=None).unet.state_dict()
        for path in (tiny_checkpoint, tmp_path / "result")
    )
    assert base.keys() == saved.keys()
    assert all(torch.equal(base[name], saved[name]) for name in base)


def test_a_saved_folder_is_trained_on(make_trainer, tmp_path):
    first = make_trainer(num_epochs=1, train_learning_rate=0.1)
    first.train()
    first.save_pretrained(tmp_path / "result")
    second = make_trainer(checkpoint=tmp_path / "result")
    for name, value in first.policy.parameters().items():
        assert torch.equal(second.policy.parameters()[name], value), name


def test_a_run_learns_a_reward(make_trainer):
    seen = Seen()
    options = {"num_epochs": 12, "sample_batch_size": 16, "sample_num_batches_per_epoch": 1, "train_batch_size": 16}
    trainer = make_trainer(hook=seen, train_learning_rate=0.01, save_freq=100, sample_guidance_scale=1.0, **options)
    trainer.train()
    rewards = [float(data[0][3].mean()) for data, _ in seen]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.005


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(make_trainer, tmp_path):
    options = {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2}
    whole = make_trainer(num_epochs=4, project_kwargs={"project_dir": str(tmp_path / "whole")}, **options)
    whole.train()
    make_trainer(num_epochs=3, **options).train()
    random.seed(77)
    resumed = make_trainer(num_epochs=4, resume_from=str(tmp_path / "checkpoints"), **options)
    assert resumed.first_epoch == 3
    resumed.train()
    for name, value in whole.policy.parameters().items():
        assert torch.equal(value, resumed.policy.parameters()[name]), name


def test_another_run_s_checkpoints_are_not_mixed_with_this_one_s(make_trainer):
    make_trainer(num_epochs=2).train()
    with pytest.raises(UserError, match="checkpoints of another run; resume it with resume_from"):
        make_trainer()


def test_no_more_checkpoints_are_kept_than_asked_for(make_trainer, tmp_path):
    make_trainer(num_epochs=4, num_checkpoint_limit=2).train()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_2", "checkpoint_3"]


def test_the_whole_denoiser_is_trained_without_lora(make_trainer, tmp_path):
    trainer = make_trainer(use_lora=False, num_epochs=1)
    denoiser = trainer.sd_pipeline.unet
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    trainer.train()
    trained = {name: value.clone() for name, value in denoiser.state_dict().items()}
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    with trainer.policy.switched_off():
        assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
    assert all(torch.equal(trained[name], value) for name, value in denoiser.state_dict().items())
    trainer.save_pretrained(tmp_path / "result")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "result", safety_checker=None).unet.state_dict()
    assert all(torch.equal(trained[name], saved[name]) for name in trained)


def test_rewards_scored_in_threads_are_the_same(make_trainer, tmp_path):
    trainers = [
        make_trainer(
            async_reward_computation=wait, num_epochs=1, project_kwargs={"project_dir": str(tmp_path / str(wait))}
        )
        for wait in (False, True)
    ]
    for trainer in trainers:
        random.seed(0)
        trainer.train()
    first, second = (trainer.policy.parameters() for trainer in trainers)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_fraction_of_the_steps_is_chosen_anew_for_each_update(make_trainer):
    trainer = make_trainer(sample_num_steps=4, train_timestep_fraction=0.5, num_epochs=1)
    chosen = []
    run_step = trainer._trainer.run_step
    trainer._trainer.run_step = lambda: chosen.append(trainer._rollouts.batch.steps) or run_step()
    for epoch in range(4):
        trainer.step(epoch, 0)
    assert all(len(set(steps)) == 2 for steps in chosen)
    assert len(set(chosen)) > 1


def test_every_inner_epoch_learns_from_every_image_once(make_trainer):
    trainer = make_trainer(train_num_inner_epochs=2, num_epochs=1)
    learned = []
    run_step = trainer._trainer.run_step
    trainer._trainer.run_step = lambda: learned.extend(trainer._rollouts.batch.rows.tolist()) or run_step()
    assert trainer.step(0, 0) == 4
    assert sorted(learned[:4]) == sorted(learned[4:]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda images: images.mean(dim=(1, 2, 3)), r"returned Tensor, but it must return \(scores, metadata\)"),
        (lambda images: (images.mean(), {}), r"scores of shape \(\) for 2 images"),
        (lambda images: ([1.0, float("nan")], {}), "its score is nan for the prompt"),
    ],
)
def test_a_reward_function_that_returns_nonsense_is_told_so(make_trainer, returned, message):
    trainer = make_trainer(reward=lambda images, prompts, metadata: returned(images))
    with pytest.raises(UserError, match=f"reward_function: .*{message}"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 3}, "2 x 2 = 4 images per process, which is not a multiple of train_batch_size 3 x"),
        ({"sample_num_steps": 0}, "sample_num_steps: got 0"),
        ({"train_timestep_fraction": 0.1}, "train_timestep_fraction: 0.1 of 3 steps is 0"),
        ({"sample_eta": 0.0}, "sample_eta: got 0.0"),
        ({"mixed_precision": "fp8"}, "'fp8' is not supported; allowed: no, bf16, fp16"),
        ({"resume_from": "nowhere"}, "resume_from: there is no checkpoint at nowhere"),
    ],
)
def test_impossible_options_are_refused(make_trainer, options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(**options)


def test_8_bit_adam_says_what_to_install(make_trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="train_use_8bit_adam: needs bitsandbytes; run `pip install bitsandbytes`"):
        make_trainer(train_use_8bit_adam=True)


def test_fp16_becomes_float32_on_a_cpu_with_a_warning(make_trainer, caplog):
    trainer = make_trainer(mixed_precision="fp16", accelerator_kwargs={"cpu": True})
    assert trainer.accelerator.mixed_precision == "no"
    assert "mixed_precision: using 'no' instead of 'fp16'" in caplog.text


def test_frozen_weights_are_cast_and_trained_ones_are_not(tiny_checkpoint):
    policy = DefaultDDPOStableDiffusionPipeline(str(tiny_checkpoint)).prepare(
        torch.device("cpu"), torch.bfloat16, seed=0
    )
    trained = {id(parameter) for parameter in policy.parameters().values()}
    assert {parameter.dtype for parameter in policy.parameters().values()} == {torch.float32}
    frozen = [weight for weight in policy.backbone.denoiser.parameters() if id(weight) not in trained]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert {parameter.dtype for parameter in policy.backbone.pipeline.vae.parameters()} == {torch.bfloat16}


def test_a_pipeline_belongs_to_one_trainer(make_config, tiny_checkpoint):
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_checkpoint))
    DDPOTrainer(make_config(), brightness, prompt_function, pipeline)
    with pytest.raises(UserError, match="already belongs to another trainer"):
        DDPOTrainer(make_config(), brightness, prompt_function, pipeline)


def test_a_pipeline_of_one_s_own_is_refused_with_what_works(make_config):
    with pytest.raises(UserError, match="sd_pipeline: got a object; pass a DefaultDDPOStableDiffusionPipeline"):
        DDPOTrainer(make_config(), brightness, prompt_function, object())


def test_a_pipeline_that_is_not_there_is_named():
    with pytest.raises(UserError, match="'/nowhere/sd': there is no such file or folder"):
        DefaultDDPOStableDiffusionPipeline("/nowhere/sd")


def test_a_folder_that_trl_saved_is_refused_because_its_base_cannot_be_read_back(tiny_checkpoint, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    pipeline.save_pretrained(tmp_path / "from_trl")
    with pytest.raises(UserError, match="saved with LoRA layers inside, .* copy of the original base's folder"):
        DefaultDDPOStableDiffusionPipeline(str(tmp_path / "from_trl"))


def test_a_lora_that_diffusers_wrote_is_trained_on(tiny_checkpoint, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, folder)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)
    pipeline.unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False))
    weights = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(folder, unet_lora_layers=weights)
    policy = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=False).prepare(
        torch.device("cpu"), torch.float32, seed=0
    )
    found = {name.removeprefix("lora.positive."): value for name, value in policy.parameters().items()}
    assert found.keys() == {name.removesuffix(".weight") for name in weights}
    assert all(torch.equal(found[name.removesuffix(".weight")], value) for name, value in weights.items())

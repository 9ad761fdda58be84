"""AlignProp scripts written for TRL 0.11 run after changing their import."""

import itertools

import pytest
import torch
from diffusers import StableDiffusionPipeline

from agsm_rl.compat.trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
from agsm_rl.errors import UserError
from agsm_rl.training.sampling import step_distribution

PROMPTS = ["a red star", "a blue circle", "two green squares"]


def tint(images, prompts, metadata):
    return (images[:, 0] - images[:, 2]).mean(dim=(1, 2)), {}


@pytest.fixture
def make_trainer(tiny_checkpoint, tmp_path):
    def make(*, reward=tint, hook=None, checkpoint=tiny_checkpoint, **options) -> AlignPropTrainer:
        settings = {"num_epochs": 2, "sample_num_steps": 3, "train_batch_size": 2, "mixed_precision": "no"}
        settings |= {"project_kwargs": {"project_dir": str(tmp_path / "run")}, "sample_eta": 0.0}
        given = itertools.cycle(PROMPTS)
        pipeline = DefaultDDPOStableDiffusionPipeline(str(checkpoint))
        config = AlignPropConfig(**(settings | options))
        return AlignPropTrainer(config, reward, lambda: (next(given), {"shown": True}), pipeline, hook)

    return make


def test_a_script_trains_shows_its_images_and_saves(make_trainer, tmp_path):
    seen = []
    trainer = make_trainer(
        hook=lambda *found: seen.append(found), train_gradient_accumulation_steps=2, log_image_freq=2, num_epochs=4
    )
    trainer.train()
    assert [step for _, step, _ in seen] == [2, 4]
    batch = seen[0][0]
    assert sorted(batch) == ["images", "prompt_metadata", "prompts", "rewards"]
    assert batch["images"].shape == (2, 3, 16, 16) and not batch["images"].requires_grad
    assert batch["prompts"] == ("a red star", "a blue circle")  # calls 7 and 8 of 2 x 4
    torch.testing.assert_close(batch["rewards"], tint(batch["images"], None, None)[0])
    trainer.save_pretrained(tmp_path / "saved")
    StableDiffusionPipeline.from_pretrained(tmp_path / "saved").load_lora_weights(tmp_path / "saved")


def test_a_run_learns_its_reward(make_trainer):
    rewards = []
    trainer = make_trainer(
        hook=lambda batch, *_: rewards.append(batch["rewards"].mean().item()),
        train_learning_rate=3e-2,
        train_batch_size=3,
        num_epochs=25,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=0,
    )
    trainer.train()
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.005


@pytest.mark.parametrize("timestep", [0, 2])
def test_the_gradient_is_that_of_trl_s_unrolled_sampler(make_trainer, timestep):
    """TRL detaches the predictions of the steps before `truncated_backprop_timestep`, not the path."""
    trainer = make_trainer(
        truncated_backprop_rand=False, truncated_backprop_timestep=timestep, sample_guidance_scale=3.0
    )
    policy = trainer.policy
    for parameter in policy.parameters().values():
        parameter.data += 0.02
    objective, source = trainer._term()
    batch = source.next(policy)
    parameters = list(policy.parameters().values())
    loss, _ = objective.loss(policy, batch)
    found = torch.autograd.grad(loss, parameters)

    backbone = policy.backbone
    sampler, cond, uncond = backbone.sampler(3), backbone.encode_text(batch.prompts), backbone.encode_text([""])
    x = policy.draw.noise_like(torch.empty(2, *backbone.latent_shape), batch.rows, purpose="start")
    for k in range(3):

        def predict(*inputs, k=k):
            prediction = policy.live(*inputs)
            return prediction if k >= timestep else prediction.detach()

        x, _ = step_distribution(predict, sampler, k, x, cond, uncond, guidance=3.0, eta=0.0)
    expected_loss = 10 - tint(backbone.decode(x), None, None)[0].mean()
    torch.testing.assert_close(loss, expected_loss)
    for one, other in zip(found, torch.autograd.grad(expected_loss, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_random_truncation_draws_each_step_s_limit_and_always_keeps_the_last_step(make_trainer):
    trainer = make_trainer(sample_num_steps=10, truncated_rand_backprop_minmax=(0, 10))
    objective, _ = trainer._term()
    drawn = [objective._steps_with_gradients(step) for step in range(200)]
    assert all(9 in steps for steps in drawn)
    share = [sum(k in steps for steps in drawn) / 200 for k in range(9)]
    # Step k carries gradients if a number drawn from 0..10 is not above it.
    for k in range(9):
        assert share[k] == pytest.approx((k + 1) / 11, abs=0.12)


def test_a_run_goes_on_from_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(num_epochs=3)
    trainer.train()
    again = make_trainer(num_epochs=3, resume_from=str(tmp_path / "run" / "checkpoints"))
    assert again.first_epoch == 3
    for name, value in again.policy.parameters().items():
        assert torch.equal(value, trainer.policy.parameters()[name])


def test_a_reward_without_gradients_is_told_so(make_trainer):
    trainer = make_trainer(reward=lambda images, *_: (images.detach().mean(dim=(1, 2, 3)), {}))
    with pytest.raises(UserError, match="reward_function.*gradient"):
        trainer.train()


def test_impossible_options_are_refused(make_trainer):
    with pytest.raises(UserError, match="log_image_freq"):
        make_trainer(log_image_freq=0)

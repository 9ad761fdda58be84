"""Names, defaults, advantages, images, losses and updates are those of the real TRL 0.11.4 (see make_golden.py)."""

import inspect
import json
from dataclasses import MISSING, fields, replace
from pathlib import Path

import golden_inputs as inputs
import pytest
import torch

from agsm_rl.compat.trl import AlignPropConfig, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from agsm_rl.interfaces import RolloutBatch
from agsm_rl.objectives.ddpo import step_log_prob
from agsm_rl.sources.trajectories import StepNoise, draw_trajectories

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_0_11_4.json").read_text())
LOSSES = {
    "losses": {},
    "losses_with_a_negative_prompt": {"negative_prompts": inputs.NEGATIVE},
    "losses_without_guidance": {"train_cfg": False},
}


@pytest.fixture
def make_trainer(tmp_path):
    """Our trainer on the embedded base, its LoRA filled by the formula that filled TRL's."""

    def make(**options) -> DDPOTrainer:
        settings = {"mixed_precision": "no", "sample_num_steps": inputs.NUM_STEPS, "sample_batch_size": 2}
        settings |= {"sample_guidance_scale": inputs.GUIDANCE, "sample_num_batches_per_epoch": 1}
        config = DDPOConfig(**(settings | {"accelerator_kwargs": {"cpu": True}, "logdir": str(tmp_path)} | options))
        pipeline = DefaultDDPOStableDiffusionPipeline("builtin:shapes-sd15")
        trainer = DDPOTrainer(config, None, None, pipeline)
        inputs.fill_lora(lora(trainer))
        return trainer

    return make


def lora(trainer):
    named = trainer.policy.parameters().items()
    return {name.removeprefix("lora.positive."): parameter for name, parameter in named}


def batch_of(trainer, old_log_probs):
    """TRL's sample as a batch of ours, with what the trainer itself says of guidance and the negative prompt."""
    trajectory = inputs.unpack(GOLDEN["path"])
    advantages = torch.tensor([0.75, -6.0]).clamp(-trainer.config.train_adv_clip_max, trainer.config.train_adv_clip_max)
    return RolloutBatch(
        prompts=inputs.PROMPTS,
        rows=torch.arange(2),
        latents=trajectory[:, -1],
        rewards=torch.zeros(2),
        advantages=advantages,
        trajectory=trajectory,
        log_probs=torch.tensor(old_log_probs),
        num_steps=inputs.NUM_STEPS,
        steps=tuple(range(inputs.NUM_STEPS)),
        guidance=inputs.GUIDANCE if trainer.config.train_cfg else 1.0,
        eta=1.0,
        negative_prompt=trainer.config.negative_prompts,
    )


@pytest.mark.parametrize(("name", "config"), [("ddpo_config", DDPOConfig), ("alignprop_config", AlignPropConfig)])
def test_the_options_have_trl_s_names_and_defaults(name, config):
    ours = {item.name: item.default_factory() if item.default is MISSING else item.default for item in fields(config)}
    ours = {key: list(value) if isinstance(value, tuple) else value for key, value in ours.items()}
    assert ours.pop("exp_name")
    assert ours == GOLDEN[name]


@pytest.mark.parametrize(
    ("name", "function"),
    [("ddpo_trainer", DDPOTrainer.__init__), ("pipeline", DefaultDDPOStableDiffusionPipeline.__init__)],
)
def test_constructors_take_trl_s_arguments_in_its_order(name, function):
    assert list(inspect.signature(function).parameters)[1:] == GOLDEN[name]


def test_the_learning_rate_betas_and_epsilon_reach_the_optimiser(make_trainer):
    options = {"train_learning_rate": 0.5, "train_adam_beta1": 0.8, "train_adam_beta2": 0.95}
    trainer = make_trainer(**options, train_adam_weight_decay=0.25, train_adam_epsilon=1e-3, train_max_grad_norm=7.0)
    (group,) = trainer._trainer.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.8, 0.95), 0.25, 1e-3)
    assert trainer._trainer.max_grad_norm == 7.0


@pytest.mark.parametrize("per_prompt", [False, True])
def test_advantages_are_trl_s(make_trainer, per_prompt):
    buffer = {"per_prompt_stat_tracking_buffer_size": 4, "per_prompt_stat_tracking_min_count": 3}
    trainer = make_trainer(per_prompt_stat_tracking=per_prompt, train_adv_clip_max=100.0, **buffer)
    expected = GOLDEN["advantages"]["by_prompt" if per_prompt else "over_all"]
    for rewards, prompts, advantages in zip(inputs.REWARDS, inputs.TRACKED_PROMPTS, expected, strict=True):
        found = trainer._advantages(torch.tensor(rewards), prompts)
        assert found.tolist() == pytest.approx(advantages, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "negative_prompt"), [("sampling", ""), ("sampling_with_a_negative_prompt", inputs.NEGATIVE)]
)
def test_the_same_noise_draws_trl_s_images_with_its_log_probabilities(make_trainer, name, negative_prompt):
    class GivenNoise:
        def noise_like(self, like, rows, *, purpose):
            return inputs.normal(tuple(like.shape), purpose)

    trainer, expected = make_trainer(), GOLDEN[name]
    with torch.no_grad():
        path, log_probs = draw_trajectories(
            trainer.policy,
            inputs.PROMPTS,
            GivenNoise(),
            torch.arange(2),
            num_steps=inputs.NUM_STEPS,
            guidance=inputs.GUIDANCE,
            noise=StepNoise(),
            negative_prompt=negative_prompt,
        )
        images = trainer.policy.backbone.decode(path[:, -1])
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(log_probs, torch.tensor(expected["log_probs"]), **close)
    torch.testing.assert_close(path.flatten(2).norm(dim=2), torch.tensor(expected["latents_norm"]), **close)
    torch.testing.assert_close(path[:, -1, :, 0, :4], torch.tensor(expected["last_latents"]), **close)
    torch.testing.assert_close(images.mean(dim=(2, 3)), torch.tensor(expected["image_mean"]), **close)
    torch.testing.assert_close(images[:, :, :2, :2], torch.tensor(expected["image_corner"]), **close)


@pytest.mark.parametrize(("name", "options"), LOSSES.items())
def test_log_probabilities_losses_and_gradients_of_each_step_are_trl_s(make_trainer, name, options):
    trainer, expected = make_trainer(train_clip_range=inputs.CLIP_RANGE, **options), GOLDEN[name]
    objective, _ = trainer._term()
    parameters = lora(trainer)
    batch = batch_of(trainer, expected["old_log_probs"])
    assert sum(any(figures["gradient"].values()) for figures in expected["steps"]) == 3  # in one, both are clipped
    for k, figures in enumerate(expected["steps"]):
        with torch.no_grad():
            log_prob = step_log_prob(trainer.policy, batch, k)
        # Machines and thread counts differ by 4e-5, and by 1e-6 of a log-probability of -1500.
        exact = 1e-4 + 2e-6 * max(map(abs, expected["log_probs"][k]))
        assert log_prob.tolist() == pytest.approx(expected["log_probs"][k], rel=0, abs=exact)
        loss, metrics = objective.loss(trainer.policy, replace(batch, steps=(k,)))
        assert loss.item() == pytest.approx(figures["loss"], rel=0, abs=5 * exact)  # advantages reach 5
        assert float(metrics["approximate_kl"]) == pytest.approx(figures["approx_kl"], rel=0, abs=0.2 * exact)
        assert float(metrics["clip_fraction"]) == figures["clipfrac"]
        gradient = torch.autograd.grad(loss, list(parameters.values()))
        assert_along(dict(zip(parameters, gradient, strict=True)), figures["gradient"], rel=5e-3)


def assert_along(found, expected, *, rel):
    """Each layer's value has the expected projection, but for a share of its own size."""
    assert found.keys() == expected.keys()
    largest = max(float(value.norm()) for value in found.values())
    for name, along in inputs.projections(found).items():
        assert along == pytest.approx(expected[name], abs=rel * (float(found[name].norm()) + 0.01 * largest)), name


def test_the_ratios_lie_on_both_sides_of_the_clip_range_for_either_sign_of_the_advantage():
    figures = GOLDEN["losses"]
    ratio = (torch.tensor(figures["log_probs"]).T - torch.tensor(figures["old_log_probs"])).exp()
    low, high = 1 - inputs.CLIP_RANGE, 1 + inputs.CLIP_RANGE
    assert [bool((one < low).any() and (one > high).any()) for one in ratio] == [True, True]
    assert (ratio - 1).abs().sub(inputs.CLIP_RANGE).abs().min() > 5e-3  # none so near that machines could disagree


def test_an_update_over_accumulated_images_and_steps_is_trl_s(make_trainer):
    trainer = make_trainer(**inputs.UPDATE)
    expected = GOLDEN["update"]
    before = {name: value.detach().clone() for name, value in lora(trainer).items()}
    logged = []
    trainer.accelerator.log = lambda values, step: logged.append(values)
    assert trainer._learn(batch_of(trainer, expected["old_log_probs"]), 0, 0, 0) == 1
    (figures,) = logged
    assert figures["loss"] == pytest.approx(expected["logged"][0]["loss"], rel=1e-4)
    assert figures["approx_kl"] == pytest.approx(expected["logged"][0]["approx_kl"], rel=0.01)
    assert figures["clipfrac"] == expected["logged"][0]["clipfrac"]
    moved = {name: value.detach() - before[name] for name, value in lora(trainer).items()}
    assert_along(moved, expected["moved"], rel=5e-3)

"""OPD: its loss by hand, teachers that read another prompt or are guided, and a policy that comes nearer to them."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import save_tiny

from agsm_rl.adapters.lora import LoRA
from agsm_rl.backbones import load_backbone
from agsm_rl.doctor.memory.predict import predict
from agsm_rl.errors import UserError
from agsm_rl.export.attach import attach_to_backbone, save_adapters
from agsm_rl.objectives.opd import OPD
from agsm_rl.objectives.policy_gradient import rollout_steps
from agsm_rl.policy import Policy
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe


@pytest.fixture
def drawn(policy, make_rollouts):
    return make_rollouts(bind=True).next(policy)


@pytest.mark.parametrize("options", [{"prompt_suffix": ", best quality"}, {"guidance": 3.0}])
def test_the_loss_is_the_divergence_from_the_teachers_steps(policy, drawn, options):
    policy.keep_reference(list(policy.adapters))  # the teacher is the base all the same
    loss, metrics = OPD(**options).loss(policy, drawn)
    asked = replace(
        drawn,
        prompts=[prompt + options.get("prompt_suffix", "") for prompt in drawn.prompts],
        guidance=options.get("guidance", drawn.guidance),
    )
    live, teacher = rollout_steps(policy, policy.live, drawn), rollout_steps(policy, policy.base, asked)
    divergences = [
        ((mean - other) ** 2).mean() / (2 * std**2) for (mean, std), (other, _) in zip(live, teacher, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(divergences).mean(), rtol=1e-4, atol=1e-7)
    assert metrics["kl"] > 0


def test_only_the_policy_gets_a_gradient_and_comes_nearer_to_the_teacher(policy, drawn):
    objective = OPD(guidance=3.0)
    parameters = list(policy.parameters().values())
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    before = float(objective.loss(policy, drawn)[1]["kl"])
    for _ in range(5):
        optimizer.zero_grad()
        objective.loss(policy, drawn)[0].backward()
        optimizer.step()
    assert float(objective.loss(policy, drawn)[1]["kl"]) < before


def test_a_teacher_that_is_the_base_as_it_is_is_refused():
    with pytest.raises(UserError, match="prompt_suffix"):
        OPD()


@pytest.fixture
def taught_run(make_backbone, tmp_path):
    """The folder of a LoRA with random weights, as a run exports it, and the base with it attached."""
    backbone = make_backbone()
    policy = Policy(backbone, {"lora": LoRA(rank=2)})
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters().values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapters(policy.adapters, tmp_path / "taught", metadata={})
    return tmp_path / "taught", backbone


def test_another_run_s_adapters_teach_and_touch_nothing_else(taught_run, make_backbone, make_rollouts):
    folder, teacher = taught_run
    policy, plain = (Policy(make_backbone(), {"lora": LoRA(rank=2)}) for _ in range(2))
    policy.add_teacher("it", attach_to_backbone(policy.backbone, folder).adapters.values())
    x_t, t = torch.randn(2, *policy.backbone.latent_shape), torch.tensor([0.3, 0.8])
    cond = policy.backbone.encode_text(["a", "b"])
    with torch.no_grad():
        assert torch.equal(policy.teacher("it", x_t, t, cond), teacher.predict(x_t, t, cond))
        for name in ("live", "ema", "reference"):
            assert torch.equal(getattr(policy, name)(x_t, t, cond), getattr(plain, name)(x_t, t, cond))
        assert not torch.equal(policy.teacher("it", x_t, t, cond), policy.reference(x_t, t, cond))
    assert list(policy.parameters()) == list(plain.parameters())


@pytest.fixture
def make_recipe(tiny_checkpoint):
    """A recipe that distils from a teacher, with options of the objective."""
    rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"brightness": 1.0}}
    rollouts |= {"num_prompts": 2, "images_per_prompt": 1, "num_steps": 3, "guidance": 1.0}

    def make(teacher, backbone=None, **options):
        return Recipe.from_data(
            {
                "steps": 2,
                "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"}
                | (backbone or {}),
                "adapters": {"lora": {"use": "lora", "rank": 2}},
                "objectives": [{"use": "opd", "teacher": str(teacher), "source": rollouts, **options}],
                "track": [],
            }
        )

    return make


def test_a_recipe_names_the_run_that_teaches(taught_run, make_recipe, tmp_path):
    trainer = build_trainer(make_recipe(taught_run[0]))
    metrics = trainer.run_step()
    assert metrics["opd/kl"] > 0 and metrics["opd/grad_norm"] > 0
    assert len(trainer.policy.adapters) == 1
    with pytest.raises(UserError, match=r"objectives\[0\].teacher.*nowhere"):
        build_trainer(make_recipe(tmp_path / "nowhere"))


@pytest.fixture(scope="session")
def other_checkpoint(tiny_checkpoint, tmp_path_factory):
    """A base of the tiny one's kind with a denoiser of its own, and a text encoder that reads prompts otherwise."""
    pipeline = load_backbone(str(tiny_checkpoint), device="cpu").pipeline
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in (pipeline.unet, pipeline.text_encoder):
            for parameter in part.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("other")
    pipeline.save_pretrained(folder)
    return folder


def test_another_checkpoint_teaches_as_it_predicts_by_itself_and_is_not_trained(make_recipe, other_checkpoint):
    trainer = build_trainer(make_recipe(other_checkpoint, prompt_suffix=", best quality"))
    policy, alone = trainer.policy, load_backbone(str(other_checkpoint), device="cpu")
    x_t, t, prompts = torch.randn(2, *policy.backbone.latent_shape), torch.tensor([0.3, 0.8]), ["a", "b"]
    teacher = policy.backbone_of_teacher(str(other_checkpoint))
    before = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    cond = teacher.encode_text(prompts)
    with torch.no_grad():
        taught = policy.teacher(str(other_checkpoint), x_t, t, cond)
        assert torch.equal(taught, alone.predict(x_t, t, alone.encode_text(prompts)))
        assert not torch.equal(taught, policy.reference(x_t, t, policy.backbone.encode_text(prompts)))
    metrics = trainer.run_step()
    assert metrics["opd/kl"] > 0 and metrics["opd/grad_norm"] > 0
    assert all(torch.equal(value, before[name]) for name, value in teacher.denoiser.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.denoiser.parameters())


def test_a_teacher_s_text_encoders_are_dropped_too_once_all_prompts_are_encoded(make_recipe, other_checkpoint):
    trainer = build_trainer(make_recipe(other_checkpoint, backbone={"text": {"keep": "cache"}}))
    texts = trainer.policy.backbone_of_teacher(str(other_checkpoint)).text_cache
    trainer.run_step()
    assert texts.encoded > 0 and not texts.encoders.freed
    for source in trainer.sources.values():  # the prompts of the step before
        source._order.position = 0
    trainer.run_step()
    assert texts.encoders.freed


def test_a_run_that_is_resumed_with_its_teacher_loaded_anew_is_the_uninterrupted_one(make_recipe, other_checkpoint):
    recipe = make_recipe(other_checkpoint)
    whole, first, resumed = (build_trainer(recipe) for _ in range(3))
    whole.run_step(), first.run_step()
    state = first.state_dict()
    assert set(state["policy"]["live"]) == set(first.policy.parameters())  # and nothing of the teacher
    resumed.load_state_dict(state)
    whole.run_step(), resumed.run_step()
    for name, parameter in whole.policy.parameters().items():
        assert torch.equal(parameter, resumed.policy.parameters()[name])


def test_check_counts_a_teacher_s_weights_and_passes(make_recipe, other_checkpoint):
    alone, taught = predict(make_recipe(other_checkpoint))[1], predict(make_recipe(other_checkpoint, guidance=3.0))[1]
    assert alone.resident["teachers"] == alone.resident["frozen weights"]
    # 2 images of 3 noisy steps: the policy's passes, and the teacher's, once or twice.
    assert (alone.passes["learning opd"].forward, taught.passes["learning opd"].forward) == (12, 18)
    assert alone.passes["learning opd"].backward == 6


@pytest.mark.parametrize(
    ("part", "option", "value", "said"),
    [
        (
            "scheduler",
            "prediction_type",
            "v_prediction",
            "prediction_type is v_prediction, the base's epsilon",
        ),
        ("scheduler", "beta_end", 0.02, "scheduler's beta_end is 0.02"),
        ("vae", "scaling_factor", 0.5, "VAE's scaling_factor is 0.5"),
    ],
)
def test_a_checkpoint_of_other_latents_or_noise_is_refused(make_policy, make_backbone, part, option, value, said):
    teacher = make_backbone()
    getattr(teacher.pipeline, part).register_to_config(**{option: value})
    with pytest.raises(UserError, match=said):
        make_policy().add_teacher_base("it", teacher)


def test_a_checkpoint_that_cannot_teach_is_refused_where_the_recipe_names_it(make_recipe, tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"objectives\[0\].teacher: .*a stable_diffusion_xl, .*base a stable_diffusion"):
        build_trainer(make_recipe(save_tiny("sdxl", tmp_path)))
    with pytest.raises(UserError, match=r"objectives\[0\].teacher: .*this run's own base"):
        build_trainer(make_recipe(tiny_checkpoint))
    with pytest.raises(UserError, match=r"objectives\[0\].teacher.*builtin:shapes-sd16.*builtin:shapes-sd15"):
        build_trainer(make_recipe("builtin:shapes-sd16"))

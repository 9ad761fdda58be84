"""OPD: its loss by hand, teachers that read another prompt or are guided, and a policy that comes nearer to them."""

from dataclasses import replace

import pytest
import torch

from agsm_rl.adapters.lora import LoRA
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
    loss, metrics = OPD(**options).loss(policy, drawn)
    asked = replace(
        drawn,
        prompts=[prompt + options.get("prompt_suffix", "") for prompt in drawn.prompts],
        guidance=options.get("guidance", drawn.guidance),
    )
    live, teacher = rollout_steps(policy, policy.live, drawn), rollout_steps(policy, policy.reference, asked)
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


def test_a_recipe_names_the_run_that_teaches(taught_run, tiny_checkpoint, tmp_path):
    rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": {"brightness": 1.0}}
    rollouts |= {"num_prompts": 2, "images_per_prompt": 1, "num_steps": 2, "guidance": 1.0}

    def make(teacher):
        return Recipe.from_data(
            {
                "steps": 1,
                "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
                "adapters": {"lora": {"use": "lora", "rank": 2}},
                "objectives": [{"use": "opd", "teacher": str(teacher), "source": rollouts}],
                "track": [],
            }
        )

    trainer = build_trainer(make(taught_run[0]))
    metrics = trainer.run_step()
    assert metrics["opd/kl"] > 0 and metrics["opd/grad_norm"] > 0
    assert len(trainer.policy.adapters) == 1
    with pytest.raises(UserError, match=r"objectives\[0\].teacher: .*nowhere"):
        build_trainer(make(tmp_path / "nowhere"))

"""OPD: its loss by hand, teachers that read another prompt or are guided, and a policy that comes nearer to them."""

from dataclasses import replace

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.objectives.opd import OPD
from agsm_rl.objectives.policy_gradient import rollout_steps


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

"""Drawing at other sizes than the backbone's own: rollouts, their losses, suites, and what is refused."""

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.evaluate.measured import entries_of
from agsm_rl.objectives.policy_gradient import log_probs_of, rollout_steps
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.schema import Evaluate
from agsm_rl.training.sizes import check_resolution, drawing_at

REWARDS = {"use": "rewards", "prompts": "builtin:shapes-prompts", "rewards": ["sharpness"], "num_images": 3}


class FixedShard:
    index, count = 0, 1

    def gather(self, values):
        return values


def test_a_backbone_has_its_own_size_again_after_drawing_at_another(each_backbone):
    own, shape = each_backbone.resolution, each_backbone.latent_shape
    step = each_backbone.resolution_step
    with pytest.raises(RuntimeError), drawing_at(each_backbone, (step, 3 * step)):
        assert each_backbone.latent_shape[2] == 3 * each_backbone.latent_shape[1]
        assert each_backbone.call_options | {"height": step, "width": 3 * step} == each_backbone.call_options
        raise RuntimeError
    assert (each_backbone.resolution, each_backbone.latent_shape) == (own, shape)


def test_rollouts_of_another_size_are_learned_from_as_they_were_drawn(make_rollouts, policy):
    source = make_rollouts(resolution=(8, 24))
    source.bind("own", 0, FixedShard())
    source.fit_to(policy.backbone)
    batch = source.next(policy)
    assert batch.latents.shape[2:] == (4, 12) and policy.backbone.decode(batch.latents).shape[2:] == (8, 24)
    again = log_probs_of(batch, rollout_steps(policy, policy.live, batch))
    torch.testing.assert_close(again, batch.log_probs[:, list(batch.steps)])
    impossible = make_rollouts(resolution=(8, 20))
    impossible.bind("own", 0, FixedShard())
    with pytest.raises(UserError, match=r"own.resolution: got \[8, 20\]; a positive multiple of 8"):
        impossible.fit_to(policy.backbone)


def test_a_drawn_world_keeps_the_base_s_size_and_others_have_the_evaluation_s():
    parts, options = Parts(where="recipe.yaml"), {"resolution": [64, 96]}
    evaluate = Evaluate.model_validate(options | {"suites": {"mine": REWARDS, "toy": {"use": "shapes"}}})
    assert [entry.resolution(evaluate) for entry in entries_of(evaluate, parts)] == [(64, 96), None]
    with pytest.raises(UserError, match="shapes is judged at the base's own resolution only"):
        entries_of(Evaluate.model_validate(options), parts)


def test_a_size_is_a_number_or_height_and_width():
    assert check_resolution([8, 16], multiple=8, where="x") == (8, 16) == check_resolution((8, 16), where="x")
    assert check_resolution(16, where="x").resolution == 16 == check_resolution([16, 16], where="x").resolution
    for wrong in ([16], [8, 8, 8], "8x8", True, [8, 8.0], 0, -8, 12, [8, 9000]):
        with pytest.raises(UserError, match="x: got"):
            check_resolution(wrong, multiple=8, where="x")
        if not isinstance(wrong, int) and wrong != [8, 9000]:
            with pytest.raises(ValueError, match=r"a size is pixels per side, such as 768, or \[height, width\]"):
                Evaluate(resolution=wrong)

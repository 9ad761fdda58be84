"""The grid of images and prompts: who is held against whom, under which bank, and the same gradient in passes."""

import pytest
import torch

from agsm_rl.errors import UserError
from agsm_rl.interfaces import PairBatch
from agsm_rl.objectives.grid import Groups, apart, group_columns
from agsm_rl.policy import Policy


@pytest.fixture
def batch(policy):
    latents = torch.randn(4, *policy.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    return PairBatch(["a star", "a red circle", "two squares", "b"], torch.arange(4), latents)


def test_each_image_is_held_against_its_own_group():
    columns, own = group_columns(8, 4)
    assert columns[5].tolist() == [4, 5, 6, 7]
    assert own.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert torch.equal(columns[torch.arange(8), own], torch.arange(8))


@pytest.mark.parametrize(
    ("others", "expected"),
    [("negative", [[1, -1], [-1, 1], [1, -1], [-1, 1]]), ("positive", [[1, 1]] * 4)],
)
def test_own_prompts_are_predicted_with_the_positive_bank_and_others_with_the_one_asked_for(
    policy, batch, others, expected
):
    def predict(x, t, c, *, bank):
        signs = torch.tensor([1.0 if one == "positive" else -1.0 for one in bank])
        return signs[:, None, None, None].expand_as(x)

    found = Groups(2, None).grid(policy, batch).predict(predict, others=others)
    assert found[:, :, 0, 0, 0].tolist() == expected


def test_the_whole_grid_is_one_pass_with_soft_tokens_and_a_pass_a_bank_with_lora(make_backbone, make_adapters, batch):
    for name, rows in (("tokens", [8]), ("lora", [4, 4])):
        policy = Policy(make_backbone(), {name: make_adapters()[name]})
        seen = []
        policy.backbone.denoiser.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))  # noqa: B023
        Groups(2, None).grid(policy, batch).predict(policy.live)
        assert seen == rows


def test_a_cell_is_the_prediction_of_its_image_under_its_prompt(policy, batch):
    grid = Groups(2, None).grid(policy, batch)
    found = grid.predict(policy.live)
    for image, column in ((0, 1), (3, 1)):
        bank = "positive" if column == grid.own[image] else "negative"
        cond = policy.backbone.encode_text([batch.prompts[grid.columns[image, column]]])
        alone = policy.live(grid.x_t[image : image + 1], grid.t[:1], cond, bank=bank)
        torch.testing.assert_close(found[image, column], alone[0], rtol=1e-4, atol=1e-5)


def test_one_noise_level_is_shared_by_the_batch_and_by_its_passes(policy, batch):
    groups = Groups(2, 1)
    levels = [groups.grid(policy, part).t for part, _ in groups.split(batch)]
    assert len(set(torch.cat(levels).tolist())) == 1


def test_images_of_one_prompt_go_to_different_groups():
    assert apart(["a", "a", "b", "b"], 2) == [0, 2, 1, 3]
    assert apart(["a", "b", "c", "d"], 2) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("prompts", "size"),
    [("bcaada", 2), ("bcaada", 3), ("aaabcd", 2), ("aabbccdd", 2), ("aabbccdd", 4), ("abababcd", 4), ("abcdefaa", 2)],
)
def test_no_group_holds_a_prompt_twice_where_that_can_be(prompts, size):
    order = apart(list(prompts), size)
    assert sorted(order) == list(range(len(prompts)))
    groups = [[prompts[row] for row in order[first : first + size]] for first in range(0, len(order), size)]
    most = -(-max(map(prompts.count, prompts)) // len(groups))
    assert max(group.count(prompt) for group in groups for prompt in group) == most


def test_broken_groups_and_groups_of_one_are_refused(batch):
    with pytest.raises(UserError, match="batch_size 4 is not a multiple of group_size 3"):
        Groups(3, None).split(batch)
    with pytest.raises(UserError, match="group_size: got 1"):
        Groups(1, None)


def test_images_of_a_group_may_share_one_noise(policy):
    latents = torch.zeros(4, *policy.backbone.latent_shape)
    batch = PairBatch(["a", "b", "c", "d"], torch.arange(4), latents)
    shared = Groups(2, None, "group").grid(policy, batch).target
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[2], shared[3])
    assert not torch.equal(shared[0], shared[2])
    own = Groups(2, None).grid(policy, batch).target
    assert not torch.equal(own[0], own[1])
    with pytest.raises(UserError, match="Did you mean 'group'"):
        Groups(2, None, "gruop")

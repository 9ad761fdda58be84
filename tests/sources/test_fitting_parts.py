"""A draw that does not fit the memory is drawn in halves, and gives what it would have given."""

import logging

import pytest
import torch

from agsm_rl.sources import rollouts as rollouts_module
from agsm_rl.sources.fitting_parts import FittingParts

TOO_MUCH = "CUDA out of memory. Tried to allocate 20.00 GiB"


def limited(most, *, calls):
    """Work that runs out of memory with more rows than `most`, and gives its rows otherwise."""

    def work(part):
        calls.append(part.tolist())
        if len(part) > most:
            raise torch.OutOfMemoryError(TOO_MUCH)
        return part.tolist()

    return work


def test_parts_are_halved_until_they_fit_and_stay_so(caplog):
    parts, calls = FittingParts(8, name="ddpo"), []
    with caplog.at_level(logging.WARNING):
        made = parts.run(torch.arange(10), limited(3, calls=calls))
    assert made == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert calls[:3] == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [0, 1]]
    assert "ddpo: 8 images at once do not fit the memory; from now on 4" in caplog.text
    assert "Write sample_batch_size: 2" in caplog.text
    calls.clear()
    parts.run(torch.arange(4), limited(3, calls=calls))
    assert calls == [[0, 1], [2, 3]]


def test_rows_that_draw_several_images_count_as_so_many():
    parts, calls = FittingParts(8, name="spo", images=4), []
    assert parts.run(torch.arange(3), limited(1, calls=calls)) == [[0], [1], [2]]
    assert parts.size == 4


@pytest.mark.parametrize(
    ("error", "halve", "rows"),
    [(RuntimeError("a shape is wrong"), True, 4), (torch.OutOfMemoryError(TOO_MUCH), False, 4)]
    + [(torch.OutOfMemoryError(TOO_MUCH), True, 1)],
)
def test_other_errors_and_what_cannot_be_halved_are_raised(error, halve, rows):
    def work(part):
        raise error

    with pytest.raises(RuntimeError, match=str(error)[:20]):
        FittingParts(8, name="ddpo").run(torch.arange(rows), work, halve=halve)


def test_a_draw_that_did_not_fit_is_the_same_in_halves_and_the_size_is_kept(policy, make_rollouts, monkeypatch):
    whole = make_rollouts(bind=True, graph_memory=0).next(policy)
    draw = rollouts_module.draw_trajectories

    def scarce(policy, prompts, *arguments, **options):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError(TOO_MUCH)
        return draw(policy, prompts, *arguments, **options)

    monkeypatch.setattr(rollouts_module, "draw_trajectories", scarce)
    source = make_rollouts(bind=True, graph_memory=0, keep_means=True)
    found = source.next(policy)
    torch.testing.assert_close(found.trajectory, whole.trajectory, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.rewards, whole.rewards, rtol=0, atol=1e-5)
    assert len(found.means) == len(found.prompts) == 4
    again = make_rollouts(bind=True)
    again.load_state_dict(source.state_dict())
    assert source.state_dict()["sample_batch_size"] == again.state_dict()["sample_batch_size"] == 2


def test_a_recipe_that_asks_for_less_gets_less(make_rollouts):
    source = make_rollouts(bind=True, sample_batch_size=3)
    state = make_rollouts(bind=True).state_dict()
    source.load_state_dict(state)
    assert source.state_dict()["sample_batch_size"] == 3

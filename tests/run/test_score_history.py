"""What evaluations say of a run: the best by a score, falls from it, and held-out rewards that fall by hacking."""

import pytest
import torch

from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.score_history import Standing, sign_of_mean


@pytest.fixture
def make_standing():
    """`bright` is trained on (by a weight), `sharp` is held out."""

    def make(weight=1.0, **changes):
        rewards = {"bright": {"use": "brightness", "weight": weight}}
        rollouts = {"use": "rollouts", "prompts": "builtin:shapes-prompts", "rewards": rewards}
        content = {
            "steps": 10,
            "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
            "adapters": {"lora": {"use": "lora"}},
            "objectives": [{"use": "ddpo", "source": rollouts}],
            "evaluate": {"every": 1, "rewards": {"bright": {"use": "brightness"}, "sharp": {"use": "sharpness"}}},
        }
        return Standing(Recipe.from_data(content | changes))

    return make


def looked_at(standing, step, *, bright=(0.5, 0.6), sharp=(0.5, 0.6)):
    scores = {"bright": torch.tensor(bright), "sharp": torch.tensor(sharp)}
    means = {name: float(values.mean()) for name, values in scores.items()} | {"overall": 0.0, "strict": 0.0}
    return standing.note_base(means, scores) if step == 0 else standing.note(step, means, scores)


def test_the_best_step_is_that_of_the_largest_score_and_the_first_of_equal_ones(make_standing):
    standing = make_standing(checkpoint={"best": "sharp"})
    found = []
    for step, value in enumerate([0.9, 0.2, 0.4, 0.4, 0.3]):
        looked_at(standing, step, sharp=(value, value))
        found.append(standing.best_step)
    assert found == [None, 1, 2, 2, 2]  # the base, step 0, has no checkpoint to keep
    assert standing.best() == {"by": "sharp", "step": 2, "value": pytest.approx(0.4), "base": pytest.approx(0.9)}


def test_a_fall_from_the_best_by_the_given_amount_says_stop(make_standing):
    standing = make_standing(stop_when={"sharp": {"falls_by": 0.25}})
    assert looked_at(standing, 1, sharp=(0.5, 0.5)) == []
    assert looked_at(standing, 2, sharp=(0.7, 0.7)) == []
    assert looked_at(standing, 3, sharp=(0.5, 0.5)) == []
    (event,) = looked_at(standing, 4, sharp=(0.4, 0.4))
    assert (event.watch, event.subject, event.step, event.action) == ("stop_when", "sharp", 4, "stop")
    assert "fell by 0.3, from 0.7 to 0.4 since step 2" in event.message


def test_the_base_counts_among_the_best_unless_the_run_began_with_other_adapters(make_standing):
    rule = {"sharp": {"falls_by": 0.25}}
    whole, continued = make_standing(stop_when=rule), make_standing(stop_when=rule, start_from="runs/other")
    for standing in (whole, continued):
        looked_at(standing, 0, sharp=(0.9, 0.9))
    assert "since the start" in looked_at(whole, 1)[0].message
    assert looked_at(continued, 1) == []


@pytest.mark.parametrize(("weight", "after", "told"), [(1, 0.9, True), (1, 0.1, False), (-1, 0.1, True)])
def test_a_held_out_reward_that_falls_while_the_trained_one_goes_its_way_is_told(make_standing, weight, after, told):
    standing = make_standing(weight)
    looked_at(standing, 1, bright=(0.5, 0.6, 0.5), sharp=(0.5, 0.6, 0.5))
    found = looked_at(standing, 2, bright=(after, after + 0.1, after), sharp=(0.3, 0.4, 0.31))
    assert [(event.watch, event.subject, event.action) for event in found] == (
        [("held_out_falls", "sharp", "warn")] if told else []
    )


def test_a_held_out_reward_that_falls_by_no_more_than_chance_is_not_told(make_standing):
    standing = make_standing()
    looked_at(standing, 1, bright=(0.5, 0.6, 0.5), sharp=(0.5, 0.6, 0.5))
    assert looked_at(standing, 2, bright=(0.8, 0.9, 0.8), sharp=(0.1, 0.9, 0.4)) == []


def test_the_sign_of_a_mean_is_told_only_where_its_interval_excludes_zero():
    assert sign_of_mean(torch.tensor([0.2, 0.3, 0.25])) == 1
    assert sign_of_mean(torch.tensor([-0.2, -0.3, -0.25])) == -1
    assert sign_of_mean(torch.tensor([-0.2, 0.3, 0.25])) == 0
    assert sign_of_mean(torch.zeros(4)) == 0


def test_what_was_known_is_continued_with_and_forgotten_when_measured_otherwise(make_standing, tmp_path):
    rules = {"checkpoint": {"best": "sharp"}, "stop_when": {"sharp": {"falls_by": 0.25}}}
    standing = make_standing(**rules)
    looked_at(standing, 0, sharp=(0.3, 0.3))
    looked_at(standing, 1, sharp=(0.7, 0.7))
    looked_at(standing, 2, sharp=(0.6, 0.6))
    torch.save(standing.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = make_standing(**rules)
    assert again.load_state_dict(state)
    assert (again.best_step, again.newest) == (1, 2)
    assert looked_at(again, 3, sharp=(0.4, 0.4)) == looked_at(standing, 3, sharp=(0.4, 0.4)) != []
    rewards = {"bright": {"use": "brightness"}, "sharp": {"use": "sharpness"}}
    other = make_standing(**rules, evaluate={"every": 1, "rewards": rewards, "num_images": 7})
    assert not other.load_state_dict(state)
    assert other.best_step is None

"""The scores of a run's evaluations: the best by a score, falls below it, and held-out rewards that fall by hacking."""

import pytest
import torch

from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run.score_history import ScoreHistory, sign_of_mean


@pytest.fixture
def make_history():
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
        return ScoreHistory(Recipe.from_data(content | changes))

    return make


def record(history, step, *, bright=(0.5, 0.6), sharp=(0.5, 0.6)):
    scores = {"bright": torch.tensor(bright), "sharp": torch.tensor(sharp)}
    means = {name: float(values.mean()) for name, values in scores.items()} | {"overall": 0.0, "strict": 0.0}
    return history.note_base(means, scores) if step == 0 else history.note(step, means, scores)


def test_the_best_step_has_the_highest_score_and_is_the_first_of_equal_ones(make_history):
    history = make_history(checkpoint={"best": "sharp"})
    best_steps = []
    for step, value in enumerate([0.9, 0.2, 0.4, 0.4, 0.3]):
        record(history, step, sharp=(value, value))
        best_steps.append(history.best_step)
    assert best_steps == [None, 1, 2, 2, 2]  # the base, step 0, has no checkpoint to keep
    assert history.best() == {"by": "sharp", "step": 2, "value": pytest.approx(0.4), "base": pytest.approx(0.9)}


def test_a_fall_below_the_best_by_the_given_amount_stops_the_run(make_history):
    history = make_history(stop_when={"sharp": {"falls_by": 0.25}})
    assert record(history, 1, sharp=(0.5, 0.5)) == []
    assert record(history, 2, sharp=(0.7, 0.7)) == []
    assert record(history, 3, sharp=(0.5, 0.5)) == []
    (event,) = record(history, 4, sharp=(0.4, 0.4))
    assert (event.watch, event.subject, event.step, event.action) == ("stop_when", "sharp", 4, "stop")
    assert "fell by 0.3, from 0.7 to 0.4 since step 2" in event.message


def test_the_base_may_be_the_best_unless_the_run_started_from_other_adapters(make_history):
    rule = {"sharp": {"falls_by": 0.25}}
    fresh, continued = make_history(stop_when=rule), make_history(stop_when=rule, start_from="runs/other")
    for history in (fresh, continued):
        record(history, 0, sharp=(0.9, 0.9))
    assert "since the start" in record(fresh, 1)[0].message
    assert record(continued, 1) == []


@pytest.mark.parametrize(("weight", "after", "reported"), [(1, 0.9, True), (1, 0.1, False), (-1, 0.1, True)])
def test_a_held_out_reward_that_falls_while_the_trained_one_improves_is_reported(make_history, weight, after, reported):
    history = make_history(weight)
    record(history, 1, bright=(0.5, 0.6, 0.5), sharp=(0.5, 0.6, 0.5))
    events = record(history, 2, bright=(after, after + 0.1, after), sharp=(0.3, 0.4, 0.31))
    assert [(event.watch, event.subject, event.action) for event in events] == (
        [("held_out_falls", "sharp", "warn")] if reported else []
    )


def test_a_held_out_reward_that_falls_within_chance_is_not_reported(make_history):
    history = make_history()
    record(history, 1, bright=(0.5, 0.6, 0.5), sharp=(0.5, 0.6, 0.5))
    assert record(history, 2, bright=(0.8, 0.9, 0.8), sharp=(0.1, 0.9, 0.4)) == []


def test_a_mean_has_a_sign_only_if_its_interval_excludes_zero():
    assert sign_of_mean(torch.tensor([0.2, 0.3, 0.25])) == 1
    assert sign_of_mean(torch.tensor([-0.2, -0.3, -0.25])) == -1
    assert sign_of_mean(torch.tensor([-0.2, 0.3, 0.25])) == 0
    assert sign_of_mean(torch.zeros(4)) == 0


def test_a_history_is_restored_unless_its_evaluations_had_other_settings(make_history, tmp_path):
    rules = {"checkpoint": {"best": "sharp"}, "stop_when": {"sharp": {"falls_by": 0.25}}}
    history = make_history(**rules)
    record(history, 0, sharp=(0.3, 0.3))
    record(history, 1, sharp=(0.7, 0.7))
    record(history, 2, sharp=(0.6, 0.6))
    torch.save(history.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = make_history(**rules)
    assert again.load_state_dict(state)
    assert (again.best_step, again.newest) == (1, 2)
    assert record(again, 3, sharp=(0.4, 0.4)) == record(history, 3, sharp=(0.4, 0.4)) != []
    rewards = {"bright": {"use": "brightness"}, "sharp": {"use": "sharpness"}}
    other = make_history(**rules, evaluate={"every": 1, "rewards": rewards, "num_images": 7})
    assert not other.load_state_dict(state)
    assert other.best_step is None

"""What works with what: every objective × adapter × stack trains, and every pair that cannot work is refused.

An objective or source that joins the registry must be given its line in SOURCE_OF or SOURCES.
"""

import copy
import math
from itertools import combinations

import pytest
import torch

from agsm_rl import registry
from agsm_rl.errors import UserError
from agsm_rl.recipe.build import build_trainer
from agsm_rl.recipe.recipe import Recipe

OBJECTIVES = sorted(registry.BUILTIN["objectives"])

SOURCES = {
    "pairs": {"dataset": "builtin:shapes", "batch_size": 4, "num_images": 16},
    "prompts": {"prompts": "builtin:shapes-prompts", "batch_size": 4},
    "preferences": {"dataset": "builtin:shapes-preferences", "batch_size": 4, "num_pairs": 16},
    "rollouts": {
        "prompts": "builtin:shapes-prompts",
        "rewards": {"jpeg_incompressibility": 1.0},
        "num_prompts": 4,
        "images_per_prompt": 4,
        "num_steps": 3,
        "guidance": 1.0,
        "keep_means": True,
    },
    "step_preferences": {
        "prompts": "builtin:shapes-prompts",
        "rewards": {"jpeg_incompressibility": 1.0},
        "num_prompts": 4,
        "candidates": 2,
        "num_steps": 3,
        "first_step": 1,
        "threshold": 0.0,
        "guidance": 1.0,
    },
}
"""Source → options small enough for a test, with a batch that every objective and view takes."""

SOURCE_OF = {
    "agsm": "pairs",
    "anchor": "pairs",
    "awm": "rollouts",
    "crd": "rollouts",
    "ddpo": "rollouts",
    "dgpo": "rollouts",
    "diffusion_dpo": "preferences",
    "diffusion_nft": "rollouts",
    "flow_dppo": "rollouts",
    "flow_grpo": "rollouts",
    "grpo_guard": "rollouts",
    "inpo": "preferences",
    "opd": "rollouts",
    "reward_backprop": "prompts",
    "score_matching": "pairs",
    "softrepa": "pairs",
    "spo": "step_preferences",
}
"""Objective → the source that it is trained from here."""

OPTIONS = {
    "opd": {"prompt_suffix": ", best quality"},
    "reward_backprop": {"rewards": {"sharpness": 1.0}, "num_steps": 3, "guidance": 1.0},
}
"""Objective → options that it cannot do without, or would be slow without."""

VIEW_OPTIONS = {"images_above": {"advantage": 0.0}}
"""View → options that it cannot do without."""

ADAPTERS = {
    "soft tokens": {"tokens": {"use": "soft_tokens", "num_tokens": 2}},
    "LoRA": {"lora": {"use": "lora", "rank": 2}},
    "both": {"tokens": {"use": "soft_tokens", "num_tokens": 2}, "lora": {"use": "lora", "rank": 2}},
}

OTHER_ADAPTERS = {
    "dora": ("ddpo", {"use": "lora", "rank": 2, "use_dora": True}),
    "rslora": ("diffusion_dpo", {"use": "lora", "rank": 2, "alpha": 2, "use_rslora": True}),
    "lokr": ("agsm", {"use": "lokr", "rank": 2, "banks": 2}),
    "loha": ("diffusion_nft", {"use": "loha", "rank": 2}),
    "oft": ("reward_backprop", {"use": "oft", "oft_block_size": 8}),
}
"""Adapters with LoRA's interface, each with one objective that trains it: objectives see predictions only."""
TRAINED = {f"{objective}-{kind}": (objective, ADAPTERS[kind]) for kind in ADAPTERS for objective in OBJECTIVES} | {
    f"{objective}-{kind}": (objective, {kind: options}) for kind, (objective, options) in OTHER_ADAPTERS.items()
}


@pytest.fixture
def train_one_step(tiny_checkpoint):
    """Train one step of the objectives over the adapters on the tiny base: the trainer, and the step's metrics."""

    def train(objectives, adapters):
        names = {SOURCE_OF[name] for name in objectives}
        recipe = Recipe.from_data(
            {
                "steps": 1,
                "backbone": {"use": "stable_diffusion", "checkpoint": str(tiny_checkpoint), "device": "cpu"},
                "adapters": copy.deepcopy(adapters),
                "sources": {name: {"use": name, **SOURCES[name]} for name in names},
                "objectives": [
                    {"use": name, "source": SOURCE_OF[name], **OPTIONS.get(name, {})} for name in objectives
                ],
                "track": [],
            }
        )
        trainer = build_trainer(recipe)
        with torch.no_grad():
            for value in trainer.policy.parameters().values():
                value += 0.02  # a LoRA begins as nothing, where an anchor has no pull
        before = {name: value.detach().clone() for name, value in trainer.policy.parameters().items()}
        metrics = trainer.run_step()
        for name in objectives:
            assert math.isfinite(metrics[f"{name}/loss"])
            assert metrics[f"{name}/grad_norm"] > 0
        changed = {
            name.partition(".")[0]
            for name, value in trainer.policy.parameters().items()
            if not torch.equal(value, before[name])
        }
        assert changed == set(adapters)
        assert all(torch.isfinite(value).all() for value in trainer.policy.parameters().values())
        return metrics

    return train


def test_every_objective_and_source_has_its_line_here():
    assert sorted(SOURCE_OF) == OBJECTIVES
    assert sorted(SOURCES) == sorted(registry.BUILTIN["sources"])


@pytest.mark.parametrize(("objective", "adapters"), TRAINED.values(), ids=TRAINED)
def test_every_objective_trains_every_kind_of_adapter(train_one_step, objective, adapters):
    metrics = train_one_step([objective], adapters)
    assert metrics["loss"] == metrics[f"{objective}/loss"] and metrics["grad_norm"] > 0


def stacks_with_every_two():
    """Stacks of up to four objectives; every two objectives are together in at least one of them."""
    left, stacks = dict.fromkeys(combinations(OBJECTIVES, 2)), []
    while left:
        stack = list(next(iter(left)))
        while len(stack) < 4:
            others = [one for one in OBJECTIVES if one not in stack]
            news = {one: sum(tuple(sorted((one, other))) in left for other in stack) for one in others}
            best = max(news, key=news.get)
            if not news[best]:
                break
            stack.append(best)
        stacks.append(sorted(stack))
        for pair in combinations(stacks[-1], 2):
            left.pop(pair, None)
    return stacks


@pytest.mark.parametrize("stack", stacks_with_every_two(), ids="-".join)
def test_every_two_objectives_train_as_a_stack(train_one_step, stack):
    metrics = train_one_step(stack, ADAPTERS["both"])
    for first, second in combinations(stack, 2):
        assert -1 <= metrics[f"cosine/{first}/{second}"] <= 1
    assert metrics["loss"] == pytest.approx(sum(metrics[f"{name}/loss"] for name in stack), rel=1e-6, abs=1e-6)


def test_every_two_objectives_are_in_a_stack():
    together = {pair for stack in stacks_with_every_two() for pair in combinations(stack, 2)}
    assert together == set(combinations(OBJECTIVES, 2))


def load(kind, name):
    return registry.load(kind, name, where=name)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("source", sorted(SOURCES))
@pytest.mark.parametrize("view", [None, *sorted(registry.BUILTIN["views"])])
def test_a_recipe_is_read_where_the_batches_fit_and_refused_with_the_reason_where_not(objective, source, view):
    term = {"use": objective, "source": {"use": source, **SOURCES[source]}, **OPTIONS.get(objective, {})}
    content = {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
        "adapters": {"lora": {"use": "lora"}},
        "objectives": [term if view is None else term | {"view": {"use": view, **VIEW_OPTIONS.get(view, {})}}],
    }
    gives, giver = load("sources", source).gives, source
    refusals = []
    if view is not None:
        seen = load("views", view)
        if not issubclass(gives, seen.consumes):
            refusals.append(
                f"'{view}' learns from a {seen.consumes.__name__}, but '{giver}' gives a {gives.__name__}; "
            )
        gives, giver = seen.gives, view
    consumes = load("objectives", objective).consumes
    if not issubclass(gives, consumes):
        refusals.append(f"'{objective}' learns from a {consumes.__name__}, but '{giver}' gives a {gives.__name__}; ")
    if not refusals:
        assert Recipe.from_data(content).objectives[0].use == objective
        return
    with pytest.raises(UserError, match=rf"recipe: objectives\[0\]\.(source|view): {refusals[0]}.*work"):
        Recipe.from_data(content)


def test_a_refusal_names_the_sources_and_the_views_that_work():
    content = {
        "steps": 1,
        "backbone": {"use": "stable_diffusion", "checkpoint": "builtin:shapes-sd15"},
        "adapters": {"lora": {"use": "lora"}},
        "objectives": [{"use": "diffusion_dpo", "source": {"use": "rollouts", **SOURCES["rollouts"]}}],
    }
    with pytest.raises(UserError, match="sources that work: preferences; views .*: best_against_worst of rollouts"):
        Recipe.from_data(content)

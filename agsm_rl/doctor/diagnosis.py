"""`agsm-rl doctor`: do the parts of a recipe work on this machine? One finding per line, green, or red with a remedy.

Nothing is trained or written, and the checks know no objective, reward or adapter by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from agsm_rl.doctor.finding import Finding, green, red
from agsm_rl.errors import UserError
from agsm_rl.recipe.recipe import Recipe


def diagnose(recipe: Recipe, *, run: Path | None = None) -> Iterator[Finding]:
    """All findings about a recipe, or about a run folder (its checkpoints and the adapters as trained), one by one.

    Raises UserError if the recipe cannot be built at all; anything else that is wrong is a red finding.
    """
    from agsm_rl.doctor.adapters import base_prediction, check_adapters
    from agsm_rl.doctor.files import check_bases, check_run, load_run
    from agsm_rl.doctor.learning import check_learning
    from agsm_rl.doctor.rewards import check_rewards, configured_rewards
    from agsm_rl.recipe.build import build_backbone, build_terms, build_trainer

    yield from guarded("bases", lambda: check_bases(recipe))
    rewards = configured_rewards(build_terms(recipe))
    rewards += recipe.parts.evaluated_rewards(recipe.evaluate).values() if recipe.evaluate else []
    yield from guarded("rewards", lambda: check_rewards(rewards))
    if run is not None:
        yield from guarded("run folder", lambda: check_run(run))
    # Before anything is attached: the reference for "off".
    base = base_prediction(build_backbone(recipe.backbone, parts=recipe.parts))
    trainer = build_trainer(recipe, fresh=run is None)
    if run is not None:
        yield from guarded("run folder", lambda: load_run(trainer, run))
    yield from guarded("adapters", lambda: check_adapters(trainer.policy, base, trained=run is not None))
    yield from guarded("learning", lambda: check_learning(trainer))


def guarded(what: str, findings: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings. An error becomes a finding too, so that the other checks still run."""
    try:
        yield from findings()
    except UserError as error:
        yield red(what, str(error), "fix what the message names")
    except Exception as error:
        yield red(what, f"{type(error).__name__}: {error}", "this should not happen; please report it")


__all__ = ["Finding", "diagnose", "green", "red"]

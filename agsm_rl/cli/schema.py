"""`agsm-rl schema`: what editors need to complete and check recipes."""

from __future__ import annotations

import json

from agsm_rl.run.screen import say


def schema() -> None:
    """Print a JSON Schema of recipes for editors, with all that is installed here; docs/cli.md says how to use it."""
    from agsm_rl.recipe.json_schema import recipe_schema

    say(json.dumps(recipe_schema(), indent=1))

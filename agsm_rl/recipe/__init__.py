"""From YAML to objects: what a recipe may say, its defaults, and what it is built into."""

from agsm_rl.recipe.recipe import Recipe

__all__ = ["Recipe"]

"""A recipe: read from YAML or plain data, checked, and completed with every default."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import yaml
from pydantic import PrivateAttr, ValidationError

from agsm_rl.errors import UserError, combined
from agsm_rl.files import local_path
from agsm_rl.recipe.between_blocks import mistakes_between_blocks
from agsm_rl.recipe.first_look import mistakes_in_blocks
from agsm_rl.recipe.options import mistakes_in
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.resolve import resolve
from agsm_rl.recipe.schema import RecipeKeys
from agsm_rl.recipe.yaml_file import apply_overrides, read_yaml

HEADER = "# Fully resolved: every default is written out. `seed: null` in a block means the recipe's seed.\n"


class Recipe(RecipeKeys):
    """A run: everything that `agsm-rl train` needs to know."""

    _parts: Parts = PrivateAttr(default_factory=lambda: Parts(where="recipe"))

    @classmethod
    def from_yaml(
        cls, path: str | os.PathLike[str], overrides: Iterable[str] = (), *, allow_imports: Collection[str] = ()
    ) -> Recipe:
        """Read, check and complete a recipe. `overrides` are `key.path=value` texts, as `--set` takes them.

        UserError lists all mistakes: where each one is, what was got and what is allowed. No file is written and no
        model loaded.
        """
        data = read_yaml(local_path(path))
        if "axes" in data:
            raise UserError(f"{path}: is a sweep (it has `axes`), not a recipe; run it with `agsm-rl sweep {path}`.")
        apply_overrides(data, overrides)
        return cls.from_data(data, where=str(path), allow_imports=allow_imports)

    @classmethod
    def from_data(cls, data: dict[str, Any], *, where: str = "recipe", allow_imports: Collection[str] = ()) -> Recipe:
        """The same from plain data, e.g. a dict written in Python."""
        in_blocks = mistakes_in_blocks(data, where) if isinstance(data, Mapping) else []
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise combined(where, [*mistakes_in(error, where=f"{where}: "), *in_blocks]) from error
        recipe._parts = Parts(where=where, allow_imports=allow_imports)
        if in_blocks:  # known before what the recipe names is imported, which takes seconds
            raise combined(where, [*in_blocks, *mistakes_between_blocks(recipe, recipe.parts)])
        return resolve(recipe, recipe.parts)

    @property
    def parts(self) -> Parts:
        """Makes what the recipe's blocks name; it knows the recipe's file and what the command line allows."""
        return self._parts

    def __eq__(self, other: object) -> bool:
        """Two recipes are equal where they say the same, whichever files they were read from."""
        return isinstance(other, Recipe) and self.to_data() == other.to_data()

    def to_yaml(self) -> str:
        """The recipe as YAML, which `from_yaml` takes back."""
        return HEADER + yaml.safe_dump(self.to_data(), sort_keys=False, allow_unicode=True, width=120)

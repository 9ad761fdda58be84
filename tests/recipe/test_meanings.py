"""The descriptions of options are read from the docstrings of a class and its bases."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from agsm_rl.backbones import load_backbone
from agsm_rl.recipe.meanings import about, in_words, options_of


class Base:
    """A base.

    Args:
        size: Its size.
        low, high: Its bounds.
    """

    def __init__(self, *, size: int = 1, low: float = 0.0, high: float = 1.0, seed: int = 0) -> None: ...


class Explained(Base):
    """What it is.

    And more of it.

    Args:
        size: Its size in pixels,
            which is two lines long.
    """


def test_the_description_of_a_class_excludes_its_options():
    assert about(Explained) == "What it is.\n\nAnd more of it."


def test_options_are_explained_by_the_class_then_by_its_bases():
    meanings = {option.name: option.meaning for option in options_of(Explained, where="here")}
    assert meanings == {
        "size": "Its size in pixels, which is two lines long.",
        "low": "Its bounds.",
        "high": "Its bounds.",
        "seed": "Random seed. Null: the recipe's seed.",
    }


def test_an_option_that_several_kinds_have_is_explained_for_each():
    meanings = {option.name: option.meaning for option in options_of(load_backbone, where="here")}
    assert meanings["text_length"].startswith("`sana`: Rows of text") and " `flux_2`: " in meanings["text_length"]
    assert meanings["dtype"].startswith("Data type of the frozen weights")


def test_an_undocumented_option_has_an_empty_meaning():
    class Silent:
        def __init__(self, given: int, size: int = 2) -> None: ...

    assert [option.to_json() for option in options_of(Silent, where="here")] == [
        {"name": "given", "type": "int", "meaning": ""},
        {"name": "size", "type": "int", "default": "2", "meaning": ""},
    ]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "int or null"),
        (Literal["live", "ema"], "live or ema"),
        (Literal["2.0", "2.1"], '"2.0" or "2.1"'),
        (Annotated[float, Field(gt=0)] | dict[str, float], "float or dict[str, float]"),
        (tuple[float, float], "tuple[float, float]"),
        (Mapping[str, Any], "dict[str, any]"),
    ],
)
def test_types_are_written_as_in_yaml(annotation, words):
    assert in_words(annotation) == words

"""What a registered class takes, read from its source: nothing is imported, so that mistakes are answered at once.

Only types that need no import are known (numbers, texts, lists, literals); what cannot be read is left to `validated`,
which imports the class.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from agsm_rl.recipe.options import Section, model_of_arguments

TYPES = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "list": list,
    "dict": dict,
    "tuple": tuple,
    "Mapping": Mapping,
    "Sequence": Sequence,
    "Literal": Literal,
    "Any": Any,
}
FARTHEST = 8
"""Base classes and imports that are followed."""


@cache
def model_in_source(target: str) -> type[Section] | None:
    """The schema of the constructor at `module:Class`; None where its source does not say."""
    module, _, name = target.partition(":")
    with suppress(OSError, SyntaxError, ValueError, ImportError, RecursionError):
        if (arguments := _arguments(module, name, FARTHEST)) is not None:
            return model_of_arguments(name, arguments)
    return None


@cache
def summary_of(target: str) -> str:
    """The first sentence of what `module:Class` says about itself; of its module where it says nothing."""
    module, _, name = target.partition(":")
    with suppress(OSError, SyntaxError, ValueError, ImportError, RecursionError):
        file = _file(module)
        if file is not None:
            tree = _tree(file)
            named = [part for part in tree.body if isinstance(part, ast.ClassDef | ast.FunctionDef)]
            about = [ast.get_docstring(part) for part in named if part.name == name] + [ast.get_docstring(tree)]
            return next((first_sentence(text) for text in about if text), "")
    return ""


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`{\[])", paragraph, maxsplit=1)[0]


def _arguments(module: str, name: str, farthest: int) -> dict[str, tuple[Any, Any]] | None:
    file = _file(module)
    if file is None or not farthest:
        return None
    tree = _tree(file)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _of_function(node.args, tree)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node, tree, module, farthest)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _arguments(node.module, alias.name, farthest - 1)
    return None


def _of_class(node: ast.ClassDef, tree: ast.Module, module: str, farthest: int) -> dict[str, tuple[Any, Any]] | None:
    if node.decorator_list:  # dataclass and others that write constructors
        return None
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return _of_function(part.args, tree, skip=1)
    for base in node.bases:
        if isinstance(base, ast.Name) and (arguments := _arguments(module, base.id, farthest - 1)) is not None:
            return arguments
    return None


def _of_function(given: ast.arguments, tree: ast.Module, *, skip: int = 0) -> dict[str, tuple[Any, Any]] | None:
    if given.vararg or given.kwarg:
        return None
    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    arguments = {part.arg: (_type(part, tree), ... if i < required else None) for i, part in enumerate(positional)}
    for part, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        arguments[part.arg] = (_type(part, tree), ... if default is None else None)
    return dict(list(arguments.items())[skip:])


def _type(argument: ast.arg, tree: ast.Module) -> Any:
    """The annotation, if it is made of plain types, or of names that the file gives to such; otherwise Any."""
    if argument.annotation is None:
        return Any
    named = {
        part.targets[0].id: part.value
        for part in tree.body
        if isinstance(part, ast.Assign) and len(part.targets) == 1 and isinstance(part.targets[0], ast.Name)
    }
    known: dict[str, Any] = dict(TYPES)
    for name in {part.id for part in ast.walk(argument.annotation) if isinstance(part, ast.Name)} & named.keys():
        known[name] = _evaluated(named[name], TYPES)
    return _evaluated(argument.annotation, known)


def _evaluated(annotation: ast.expr, known: Mapping[str, Any]) -> Any:
    allowed = (ast.Name, ast.Subscript, ast.BinOp, ast.BitOr, ast.Constant, ast.Tuple, ast.Load)
    if not all(isinstance(part, allowed) for part in ast.walk(annotation)):
        return Any
    try:
        return eval(ast.unparse(annotation), {"__builtins__": {}}, dict(known))
    except Exception:  # a type from elsewhere
        return Any


def _file(module: str) -> Path | None:
    """The source of a module. Its packages are not imported, only the outermost one is looked for."""
    first, *rest = module.split(".")
    spec = find_spec(first)
    if spec is None or not spec.origin:
        return None
    place = Path(spec.origin).parent.joinpath(*rest) if rest or spec.submodule_search_locations else Path(spec.origin)
    for file in (place / "__init__.py", place.with_suffix(".py"), place):
        if file.is_file():
            return file
    return None


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())

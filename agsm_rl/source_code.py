"""What a registered class takes and says of itself, read from its source: nothing is imported.

So a mistake in a recipe is answered at once. Only types that need no import are known (numbers, texts, lists,
literals). A constructor whose `**options` go on to others says so by `takes`, and has their arguments too.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from agsm_rl.registry import BUILTIN

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


def arguments_in_source(target: str) -> dict[str, tuple[Any, Any]] | None:
    """The arguments of the constructor at `module:Class`, {name: (type, default)}; None where its source does not say.

    A default is None where there is one, and `...` where there is none.
    """
    module, _, name = target.partition(":")
    with suppress(OSError, SyntaxError, ValueError, ImportError, RecursionError):
        return _arguments(module, name, FARTHEST)
    return None


@cache
def own_options(kind: str) -> dict[str, tuple[Any, Any]]:
    """The keyword-only arguments that each registered class of a kind has beside those it passes on."""
    options: dict[str, tuple[Any, Any]] = {}
    for target in BUILTIN[kind].values():
        module, _, name = target.partition(":")
        file = _file(module)
        for node in _tree(file).body if file is not None else ():
            if isinstance(node, ast.ClassDef) and node.name == name and (init := _constructor(node)) is not None:
                own = {part.arg for part in init.args.kwonlyargs} if _passed_on(init) is not None else set()
                found = _of_arguments(init.args, _tree(file)) if file is not None else {}
                options |= {key: value for key, value in found.items() if key in own}
    return options


Function = TypeVar("Function", bound=Callable[..., Any])


def takes(*others: type, every: str | None = None) -> Callable[[Function], Function]:
    """The decorated function passes its `**` on to these constructors: their arguments are its own too.

    every: a kind of registered classes; the function takes the own options of each of them.
    """

    def decorate(function: Function) -> Function:
        given = inspect.signature(function).parameters.values()
        parameters = {part.name: part for part in given if part.kind is not part.VAR_KEYWORD}
        for other in others:
            for name, part in inspect.signature(other).parameters.items():
                parameters.setdefault(name, part)
        for name, (annotation, _) in own_options(every).items() if every else ():
            more = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)
            parameters.setdefault(name, more)
        function.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        function.__passed_on__ = (others, every)  # type: ignore[attr-defined]
        return function

    return decorate


def passed_on(function: Any) -> tuple[dict[str, Any], list[Any]]:
    """The classes whose arguments a function `takes`, imported; their docstrings say what they mean.

    The registered ones by the names that they are registered under, and the others.
    """
    others, every = getattr(function, "__passed_on__", ((), None))
    targets = {name: target.partition(":") for name, target in BUILTIN[every].items()} if every else {}
    named = {name: getattr(import_module(module), part) for name, (module, _, part) in targets.items()}
    return {name: part for name, part in named.items() if inspect.isclass(part)}, list(others)


def _arguments(module: str, name: str, farthest: int) -> dict[str, tuple[Any, Any]] | None:
    file = _file(module)
    if file is None or not farthest:
        return None
    tree = _tree(file)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _of_function(node, tree, module, farthest)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node, tree, module, farthest)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _arguments(node.module, alias.name, farthest - 1)
    return None


def _of_class(node: ast.ClassDef, tree: ast.Module, module: str, farthest: int) -> dict[str, tuple[Any, Any]] | None:
    if node.decorator_list:  # those that write constructors: dataclass is known
        return _of_fields(node, tree) if _is_dataclass(node) else None
    if (init := _constructor(node)) is not None:
        return _of_function(init, tree, module, farthest, skip=1)
    for base in node.bases:
        if isinstance(base, ast.Name) and (arguments := _arguments(module, base.id, farthest - 1)) is not None:
            return arguments
    return None


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = {ast.unparse(mark.func if isinstance(mark, ast.Call) else mark) for mark in node.decorator_list}
    return names == {"dataclass"} and not node.bases


def _of_fields(node: ast.ClassDef, tree: ast.Module) -> dict[str, tuple[Any, Any]]:
    """A dataclass's fields."""
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    return {
        part.target.id: (_type(part, tree), ... if part.value is None else None)
        for part in fields
        if isinstance(part.target, ast.Name) and not ast.unparse(part.annotation).startswith(("KW_ONLY", "ClassVar"))
    }


def _passed_on(function: ast.FunctionDef) -> ast.Call | None:
    """The mark `@takes(…)` on a function, where it has one."""
    marks = [mark for mark in function.decorator_list if isinstance(mark, ast.Call)]
    return next((mark for mark in marks if ast.unparse(mark.func) == takes.__name__), None)


def _of_function(
    function: ast.FunctionDef, tree: ast.Module, module: str, farthest: int, *, skip: int = 0
) -> dict[str, tuple[Any, Any]] | None:
    given, passed_on = function.args, _passed_on(function)
    if given.vararg or (given.kwarg and passed_on is None):
        return None
    arguments = dict(list(_of_arguments(given, tree).items())[skip:])
    for other in passed_on.args if passed_on is not None else ():
        more = _arguments(module, other.id, farthest - 1) if isinstance(other, ast.Name) else None
        if more is None:
            return None
        arguments |= {name: part for name, part in more.items() if name not in arguments}
    for option in passed_on.keywords if passed_on is not None else ():
        more = own_options(ast.literal_eval(option.value))
        arguments |= {name: part for name, part in more.items() if name not in arguments}
    return arguments


def _of_arguments(given: ast.arguments, tree: ast.Module) -> dict[str, tuple[Any, Any]]:
    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    arguments = {part.arg: (_type(part, tree), ... if i < required else None) for i, part in enumerate(positional)}
    for part, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        arguments[part.arg] = (_type(part, tree), ... if default is None else None)
    return arguments


def _type(argument: ast.arg | ast.AnnAssign, tree: ast.Module) -> Any:
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

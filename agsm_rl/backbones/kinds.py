"""The kinds of backbones that there are: every registered class, and which of them a pipeline or a file is.

A kind is declared by its class alone (declaration.py) and one line in registry.py.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from agsm_rl import registry
from agsm_rl.backbones.declaration import Declaration
from agsm_rl.errors import UserError

STABLE_DIFFUSION = "agsm_rl.backbones.stable_diffusion:StableDiffusion"
"""`use: stable_diffusion` takes every kind, as it did before there was `auto`, so the registry does not name it."""


def _builtin_kinds() -> Iterator[type[Declaration]]:
    """One after another: each is imported, with its pipeline, when the caller has not found what it looks for."""
    for target in dict.fromkeys([STABLE_DIFFUSION, *registry.BUILTIN["backbones"].values()]):
        module, _, name = target.partition(":")
        kind: Any = getattr(import_module(module), name)
        if isinstance(kind, type):
            yield kind


def _kinds() -> Iterator[type[Declaration]]:
    """The builtin kinds first, then those of other packages, then those that a recipe names by `module:Class`."""
    builtin = []
    for kind in _builtin_kinds():
        builtin.append(kind)
        yield kind
    import_from_packages()
    imported = dict.fromkeys(kind for kind in _descendants(Declaration) if hasattr(kind, "wraps"))
    yield from (kind for kind in imported if kind not in builtin)


def import_from_packages() -> list[str]:
    """Import the kinds of other packages; what is wrong with those that cannot be imported."""
    mistakes = []
    for name, entry in registry.available("backbones").items():
        if entry.package != registry.HOME:
            try:
                registry.load("backbones", name, where=f"backbone '{name}'")
            except UserError as error:
                mistakes.append(str(error))
    return mistakes


def _descendants(kind: type[Declaration]) -> Iterator[type[Declaration]]:
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)


def kind_of(pipeline_class: str) -> type[Declaration] | None:
    """The backbone that wraps a pipeline class of that name."""
    return next((kind for kind in _kinds() if pipeline_class in kind.wraps), None)


def is_loadable(pipeline_class: str) -> bool:
    """Whether a checkpoint may be of the pipeline class of that name."""
    return any(pipeline_class in (kind.loads or kind.wraps) for kind in _kinds())


def loadable() -> list[str]:
    """The names of the pipeline classes that a checkpoint may be of."""
    return [name for kind in _kinds() for name in kind.loads or kind.wraps]


def single_file_markers() -> dict[str, str]:
    """How a tensor's name begins in a single file of each pipeline class; the most telling beginnings come first."""
    markers = {marker: name for kind in _kinds() for marker, name in kind.single_files.items()}
    return dict(sorted(markers.items(), key=lambda entry: -len(entry[0])))


def kind_by_name(checkpoint: str) -> type[Declaration] | None:
    """The builtin backbone whose hub ids are usually called so."""
    for kind in _builtin_kinds():
        if any(part in checkpoint.lower() for part in kind.called):
            return kind
    return None

"""Everything that decides what is measured of a base on a suite, so that its figures can be kept between runs.

A figure that is read must be the one that would be measured: whatever is known to change it is in the settings, or
nothing is kept (what goes unnoticed: docs/cache.md). Our own code counts as it is on the disk, so that a checkout that
is worked on never reads figures of other code.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from agsm_rl import registry
from agsm_rl.errors import UserError
from agsm_rl.evaluate.draw_folder import versions
from agsm_rl.evaluate.measured import Entry
from agsm_rl.files import local_path
from agsm_rl.interfaces import Backbone
from agsm_rl.recipe.parts import Parts
from agsm_rl.recipe.places import PLACES
from agsm_rl.recipe.rewards import in_evaluation
from agsm_rl.recipe.schema import UNKNOWN_BATCH, Block, Evaluate, SuiteBlock

FORMAT = 1
"""Raise it when the same settings come to mean other figures."""
WITHOUT_EFFECT = frozenset({"device", "gradient_checkpointing"})
"""Options of a backbone that do not change the images it draws; nor does `local_files_only`."""
OUR_ROOMS = ("backbones", "editing", "evaluate", "shapes", "sources", "training")
"""Rooms of this package that draw, read pictures and judge."""
LIBRARIES = (
    *("numpy", "scipy", "pillow", "scikit-image", "torchvision", "torchmetrics", "accelerate"),
    *("rapidocr", "onnxruntime"),
)
"""What draws and judges beside the libraries that every record names, where it is installed."""


class NotKept(Exception):
    """The figures depend on something that cannot be known; the text says on what."""


def identity_of(backbone: Backbone) -> str:
    """What identifies a base, its adapters aside; NotKept where the backbone's class does not say."""
    identity = getattr(backbone, "drawing_identity", None)
    if identity is None:
        raise NotKept(f"the backbone '{backbone.name}' does not say what identifies its weights")
    return str(identity())


def base_settings(
    base: str, backbone: Backbone, block: Block, entry: Entry, options: Evaluate, guidance: float, parts: Parts
) -> dict[str, Any]:
    """The settings, as plain JSON; NotKept where figures must not be kept.

    `base` identifies the base, and `block` is its in the recipe.
    """
    suite = options.blocks[entry.name]
    left_out = WITHOUT_EFFECT | {*PLACES, "local_files_only"}  # the weights themselves are digested
    prompts = {str(number): dict(row) for number, row in entry.made.suite.prompts().items()}
    settings = {
        "format": FORMAT,
        "base": base,
        "backbone": [block.use, {key: value for key, value in block.options.items() if key not in left_out}],
        "suite": _suite(suite, parts),
        "prompts": hashlib.sha256(json.dumps(prompts, sort_keys=True, default=str).encode()).hexdigest(),
        "files": files_named(suite.model_dump(mode="json")),
        "num_images": entry.made.suite.num_images,
        "seed": options.seed,
        "num_steps": options.num_steps,
        "guidance": guidance,
        "prompt_suffix": options.prompt_suffix,
        "batch_size": options.batch_size or UNKNOWN_BATCH,
        "resolution": entry.resolution(options) or backbone.resolution,
        "device": _device(backbone.device),
        "versions": versions() | _installed(),
        "code": _our_code(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _suite(block: SuiteBlock, parts: Parts) -> dict[str, Any]:
    """The suite's and its rewards' names, options and code; where their prompts come from does not matter."""
    content = block.model_dump(mode="json", exclude={"final_only", "prompts"})
    entries = [("suites", block.use, block.options)]
    entries += [("rewards", entry.use, entry.options) for entry in in_evaluation(block.rewards)]
    content["code"] = {use: _code_of(kind, use, options, parts) for kind, use, options in entries}
    return content


def _code_of(kind: str, use: str, options: Mapping[str, Any], parts: Parts) -> str:
    """A digest of the code of a registered class of another package; empty for ours."""
    if ":" in use:
        raise NotKept(f"{use} is code of your own, which may change")
    registered = parts.load(kind, use, use)
    with suppress(UserError):
        if needed := registry.permissions_needed(registered, options):
            raise NotKept(f"'{use}' depends on {needed[0].replace(':', ' ', 1)}")
    package = registered.__module__.partition(".")[0]
    return "" if package in ("agsm_rl", "agsm_rl_rewards") else _code(package)


@cache
def _our_code() -> str:
    """A digest of our files that draw and judge."""
    import agsm_rl

    found = hashlib.sha256(_code("agsm_rl_rewards").encode())
    for folder in map(Path, agsm_rl.__path__):
        for room in OUR_ROOMS:
            _digest_sources(found, folder / room)
        for file in sorted(folder.glob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:32]


@cache
def _code(package: str) -> str:
    """A digest of the files of a package, weights aside, or of a module that is in none."""
    found, spec = hashlib.sha256(), find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    for folder in places:
        _digest_sources(found, Path(folder))
    if not places and spec is not None and spec.origin is not None:
        found.update(Path(spec.origin).read_bytes())
    return found.hexdigest()[:32]


def _digest_sources(found: Any, folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".safetensors":
            found.update(f"{file.relative_to(folder)}".encode())
            found.update(file.read_bytes())


def files_named(options: Any) -> dict[str, Any]:
    """Names, sizes and times of the files and folders that a suite's options name, its prompts' aside."""
    kept: dict[str, Any] = {}
    for text in _texts(options):
        with suppress(OSError, UserError, ValueError):
            path = local_path(text)
            if path.name and path.exists():  # an empty text would be the working folder
                inside = sorted(path.rglob("*")) if path.is_dir() else [path]
                stats = [(str(file.relative_to(path)), file.stat()) for file in inside if file.is_file()]
                listed = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
                kept[text] = hashlib.sha256(listed.encode()).hexdigest()[:32]
    return kept


def _texts(options: Any) -> Iterator[str]:
    if isinstance(options, str):
        yield options
    elif isinstance(options, Mapping):
        for key, value in options.items():
            if key not in ("prompts", "use"):
                yield from _texts(value)
    elif isinstance(options, list):
        for value in options:
            yield from _texts(value)


def _device(device: torch.device) -> list[str]:
    """The kind of device: of a GPU its model, of a CPU what it can compute with."""
    if device.type == "cuda":
        return [device.type, torch.cuda.get_device_name(device)]
    if device.type == "cpu":
        return [device.type, torch.backends.cpu.get_cpu_capability()]
    return [device.type]


def _installed() -> dict[str, str]:
    found = {}
    for name in (*LIBRARIES, *(name for name in ("flash_attn", "xformers", "torchao") if name in sys.modules)):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

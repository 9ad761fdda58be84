"""Files: shipped bases match their checksums, other weights are finite, a run's checkpoints and adapters are intact."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from agsm_rl.backbones.loading import BUILTINS
from agsm_rl.doctor.finding import Finding, green, red
from agsm_rl.errors import UserError
from agsm_rl.export.attach import find_exports, read_export
from agsm_rl.recipe.recipe import Recipe
from agsm_rl.run import checkpoints
from agsm_rl.trainer import Trainer

CHECKSUMS = BUILTINS / "SHA256SUMS"
"""In sha256sum's form: `sha256sum -c SHA256SUMS` in that folder says the same."""


def check_bases(recipe: Recipe) -> Iterator[Finding]:
    """Check each builtin that the backbone's block names against its shipped checksums."""
    named = [value for value in recipe.backbone.options.values() if isinstance(value, str)]
    builtins = [value.removeprefix("builtin:") for value in named if value.startswith("builtin:")]
    if not builtins:
        yield green("base", "not shipped with agsm-rl, so there are no checksums; its weights were read as safetensors")
    for name in builtins:
        yield _check_base(name)


def _check_base(name: str) -> Finding:
    what, bad = f"base 'builtin:{name}'", []
    expected = {file: digest for file, digest in shipped_checksums().items() if file.startswith(f"{name}/")}
    for file, digest in expected.items():
        path = BUILTINS / file
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            bad.append(file)
    if bad or not expected:
        detail = f"damaged: {', '.join(bad)}" if bad else "it has no checksums in SHA256SUMS"
        return red(what, detail, "install agsm-rl again (in a clone: git checkout agsm_rl/shapes/checkpoints)")
    return green(what, f"all {len(expected)} files match their checksums")


def shipped_checksums() -> dict[str, str]:
    """File (relative to the bases' folder) → SHA-256."""
    rows = [line.split(maxsplit=1) for line in CHECKSUMS.read_text(encoding="utf-8").splitlines()]
    return {file.strip().removeprefix("*"): digest for digest, file in rows}


def check_run(run: Path) -> Iterator[Finding]:
    """Each checkpoint against its checksum, and the exported adapters."""
    for name, intact in checkpoints.verdicts(run / "checkpoints").items():
        if intact:
            yield green(f"checkpoint {name}", "matches its checksum")
        else:
            yield red(
                f"checkpoint {name}", "does not match its checksum", "delete it; --resume continues from an older one"
            )
    try:
        for file in find_exports(run):
            tensors, _ = read_export(file)
            bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
            if bad:
                yield red(f"export {file.name}", f"'{bad[0]}' is not finite", "go back to an older checkpoint")
            else:
                yield green(f"export {file.name}", f"{len(tensors)} tensors, all finite")
    except UserError as error:
        yield red("export", str(error), "continue to the next checkpoint with --resume; it exports again")


def load_run(trainer: Trainer, run: Path) -> Iterator[Finding]:
    """Put the newest good checkpoint into the trainer."""
    newest = checkpoints.newest(run / "checkpoints")
    if newest is None:
        yield red("run folder", f"{run / 'checkpoints'} holds no checkpoint", "train it, or continue with --resume")
        return
    step, state = newest
    trainer.load_state_dict(state)
    yield green("run folder", f"the checkpoint of step {step} fits the recipe")

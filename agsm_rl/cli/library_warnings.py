"""One rule for what libraries warn of while a command runs: a warning is shown once, on one line, with its library.

It may concern the user's weights, data or options ("were not used", "newly initialized", "longer than the maximum"), so
nothing is hidden by its level or its library. What is hidden is listed in NOISE, by its exact words: messages about
choices of ours, which users can do nothing about. DeprecationWarning and its like are for developers; Python's own
filters hide them. A user's TRANSFORMERS_VERBOSITY, DIFFUSERS_VERBOSITY and PYTHONWARNINGS hold as ever.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agsm_rl.run.screen import say

NOISE = (
    r"The `local_dir_use_symlinks` argument is deprecated",  # huggingface_hub, of a call within datasets
    r"`\w+` requires torchvision \(not installed\); falling back to",  # the slower processor gives the same pixels
    r"`torch_dtype` is deprecated! Use `dtype` instead!",  # which of them depends on the oldest version supported
    r"There are modules in \w+ that should be kept in float32: \[\]",  # none, that is: diffusers, of a cast
    r"You have disabled the safety checker for ",  # no part of training
    r"Argument ``constant_liar`` is an experimental feature",  # optuna
    r"JournalStorage is experimental",  # optuna
    r"Failed to load \S*/torchao/_C\w*\S*\.so: ",  # kernels of another GPU than this machine's, which nothing here uses
    r"Warning: Detected no triton, on systems without Triton ",  # torchao, likewise
    r"<enum '\w+'> is an Enum subclass and is now natively supported ",  # torch, of torchao
    r"Unable to import `torchao` Tensor objects\. ",  # diffusers, of checkpoints that are quantised already
    r"You are trying to set torch_dtype to torch\.float32 for integer quantization",  # diffusers; it works
)
"""How messages begin that are not shown."""
OWN_HANDLERS = ("", "transformers", "diffusers", "datasets", "huggingface_hub", "optuna", "torch")
"""Loggers at which a message ends its way up: the root, and those of libraries that print themselves."""
LONGEST = 400
"""Characters of a message that are shown."""


@contextmanager
def shown_on_one_line() -> Iterator[None]:
    """Within the block, warnings of `logging` and `warnings` follow the rule."""
    handler = _OneLine()
    with warnings.catch_warnings():
        warnings.showwarning = handler.show_warning
        for name in OWN_HANDLERS:
            logging.getLogger(name).addHandler(handler)
        try:
            yield
        finally:
            for name in OWN_HANDLERS:
                logging.getLogger(name).removeHandler(handler)
            for logger, replaced in handler.replaced:
                logger.addHandler(replaced)


class _OneLine(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.replaced: list[tuple[logging.Logger, logging.Handler]] = []
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, in place of the library that would print it too."""
        library = record.name.partition(".")[0]
        logger = logging.getLogger(library)
        for other in logger.handlers[:]:
            if library in OWN_HANDLERS and other is not self:
                logger.removeHandler(other)
                self.replaced.append((logger, other))
        self._show(library, record.getMessage())

    def show_warning(self, message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
        """Show what `warnings` lets through."""
        parts = Path(filename).parts
        after = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-1:]
        self._show(after[0].removesuffix(".py") if after else "python", str(message))

    def _show(self, library: str, message: str) -> None:
        text = " ".join(message.split())
        if text in self._shown or any(re.match(noise, text) for noise in NOISE):
            return
        self._shown.add(text)
        short = text if len(text) <= LONGEST else text[:LONGEST] + "…"
        say(short if library.startswith("agsm_rl") else f"{library}: {short}", err=True)

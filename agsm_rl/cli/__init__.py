"""The command line: parse, call, print."""

from agsm_rl.cli.commands import app

__all__ = ["app"]

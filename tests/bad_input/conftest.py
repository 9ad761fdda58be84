"""The fixtures of bad_input.py."""

from bad_input import command, content, train

__all__ = ["command", "content", "train"]

"""events.jsonl: what a run's watches and rules saw, a line each, and the same on the screen."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from agsm_rl.run.screen import tell
from agsm_rl.trainer import Callback, Trainer
from agsm_rl.training.anomalies import Event


class EventsFile(Callback):
    """Appends events and prints them; one that stands there already is not told again."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self.console = path, console

    def add(self, event: Event) -> None:
        """Write and print an event."""
        if self.write(event):
            tell(self.console, event.message, style="yellow")

    def write(self, event: Event) -> bool:
        """Write an event; False when it stands there already."""
        line = json.dumps(event.to_json())
        if self.path.exists() and line in self.path.read_text(encoding="utf-8").splitlines():
            return False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return True

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Keep what the trainer's watch saw in this step."""
        for event in trainer.watch.events:
            self.add(event)

"""The commands that share a run's adapters: card and push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agsm_rl.run.screen import say

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
LicenceOption = Annotated[
    str | None, typer.Option("--license", metavar="NAME", help="As the hub calls it, e.g. mit. Default: the base's.")
]


def card(run: RunArgument, licence: LicenceOption = None) -> None:
    """Write the model card of a run, adapter/README.md; a card that you have made your own is kept."""
    from agsm_rl.export.model_card import write_card

    say(str(write_card(run, licence=licence)))


def push(
    run: RunArgument,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is yours alone to see.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Default: the main branch.")] = None,
    licence: LicenceOption = None,
) -> None:
    """Send a run's adapters and their model card to the Hugging Face hub, with the token of HF_TOKEN or `hf`."""
    from agsm_rl.export.push import push_to_hub

    say(push_to_hub(run, repo, private=private, revision=revision, licence=licence))

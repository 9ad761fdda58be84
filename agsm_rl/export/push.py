"""`agsm-rl push`: a run's adapters and their model card, to a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from agsm_rl.errors import UserError
from agsm_rl.export.attach import find_exports
from agsm_rl.export.model_card import MARK, write_card
from agsm_rl.files import HUB_NAME, hub_is_forbidden, read_text

SENT = ("*.safetensors", "README.md", "pictures.png")
"""What is sent of the folder of the adapters."""


def push_to_hub(
    run: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    licence: str | None = None,
) -> str:
    """Send a run's adapters and their card to the hub; the address of the commit.

    Args:
        run: The run's folder.
        repo: The repository, owner/name; it is made if it is not there.
        private: A new repository can be seen by its owner alone.
        revision: The branch; it is made if it is not there. None is the main one.
        token: The hub's. None is HF_TOKEN, or that of `hf auth login`.
        licence: The licence in the card. None is the base's, where it is known.

    Raises UserError, before anything is sent, where the run has no adapters, no token is there, or the hub may not be
    asked; and where the hub refuses. The token is never shown.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not HUB_NAME.fullmatch(repo):
        raise UserError(f"REPO '{repo}': is not a repository's name; give owner/name.")
    folder = find_exports(Path(run))[0].parent
    card = folder / "README.md"
    is_ours = not card.exists() or MARK in read_text(card)
    if licence is not None and not is_ours:
        raise UserError(f"--license: {card} is your own card, which is sent as it is; state the licence there.")
    if hub_is_forbidden():
        raise UserError("push: the hub may not be asked, because HF_HUB_OFFLINE is set; unset it.")
    if token is None and get_token() is None:
        raise UserError("push: no token; run `hf auth login`, or set HF_TOKEN to one that may write.")
    if is_ours:
        write_card(Path(run), licence=licence)
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Upload adapters trained by agsm-rl",
            allow_patterns=list(SENT),
        )
    except HfHubHTTPError as error:
        raise UserError(f"push: the hub refused ({_first_line(error)}); does the token let you write there?") from error
    except HFValidationError as error:
        raise UserError(f"REPO '{repo}': {_first_line(error)}") from error
    except Exception as error:  # whatever the installed HTTP client raises where nobody answers
        raise UserError(f"push: the hub cannot be reached ({_first_line(error)}).") from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

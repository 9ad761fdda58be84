"""Where encodings, unpacked archives and figures of bases are kept between runs."""

import os
from pathlib import Path

from agsm_rl.files import local_path


def cache_folder() -> Path:
    """$AGSM_RL_CACHE, or a folder in the cache of `datasets`. No recipe can name another."""
    import datasets

    given = os.environ.get("AGSM_RL_CACHE")
    return local_path(given) if given else Path(datasets.config.HF_DATASETS_CACHE) / "agsm_rl"

"""Other libraries' progress bars, switched off where they would stand between our lines."""


def without_loading_bars() -> None:
    """For commands that load models: the libraries' bars would stand between our lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()

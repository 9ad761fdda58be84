"""Libraries' warnings in a command: shown once and on one line, but for known noise."""

import logging
import sys
import warnings

import pytest

from agsm_rl.cli.library_warnings import NOISE, shown_on_one_line

CONCERNING = "Some weights of the checkpoint were not used:\n  ['a.weight']"


@pytest.fixture
def library():
    """A library with a handler of its own that it installs when it is imported, as transformers and diffusers do."""

    def imported() -> logging.Logger:
        root = logging.getLogger("diffusers")
        root.addHandler(handler)
        root.propagate = False
        return logging.getLogger("diffusers.models.unet")

    root, handler = logging.getLogger("diffusers"), logging.StreamHandler(sys.stderr)
    before = (root.handlers[:], root.propagate)
    yield imported
    root.handlers[:], root.propagate = before


def test_a_library_s_log_is_shown_once_and_on_one_line(library, capsys):
    with shown_on_one_line():
        logger = library()
        for _ in range(3):
            logger.warning(CONCERNING)
    assert capsys.readouterr().err == "diffusers: Some weights of the checkpoint were not used: ['a.weight']\n"


def test_a_library_s_own_handler_is_back_afterwards(library):
    with shown_on_one_line():
        library().warning(CONCERNING)
    assert [type(handler) for handler in logging.getLogger("diffusers").handlers].count(logging.StreamHandler) >= 1
    assert not any(type(handler).__name__ == "_OneLine" for handler in logging.getLogger().handlers)


def test_a_warning_is_shown_once_and_on_one_line_and_our_own_without_a_name(capsys):
    with shown_on_one_line():
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn_explicit(CONCERNING, UserWarning, "/x/site-packages/peft/tuners/a.py", 3)
            logging.getLogger("agsm_rl.sources").warning("2 images have no caption")
    assert capsys.readouterr().err.splitlines() == [
        "peft: Some weights of the checkpoint were not used: ['a.weight']",
        "2 images have no caption",
    ]


def test_known_noise_is_not_shown_and_what_resembles_it_is(library, capsys):
    with shown_on_one_line():
        warnings.simplefilter("always")
        library().warning("`CLIPImageProcessor` requires torchvision (not installed); falling back to `X`.")
        warnings.warn("The `local_dir_use_symlinks` argument is deprecated and ignored", UserWarning, stacklevel=1)
        library().warning("`CLIPImageProcessor` requires a preprocessor_config.json")
    assert capsys.readouterr().err == "diffusers: `CLIPImageProcessor` requires a preprocessor_config.json\n"


@pytest.mark.parametrize("noise", NOISE)
def test_noise_is_listed_by_its_words(noise):
    assert len(noise.split()) >= 3

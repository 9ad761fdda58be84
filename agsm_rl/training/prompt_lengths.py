"""Prompts that are longer than a model reads: what is cut off is never seen, so it is reported once per source."""

import logging
from collections.abc import Sequence

from agsm_rl.interfaces import Backbone

log = logging.getLogger(__name__)

LOOKED_AT = 10_000
"""Prompts of a data set that are looked at: tokenizing all of a large one would take minutes."""


def warn_of_cut_prompts(prompts: Sequence[str], backbone: Backbone, *, name: str, first_batch: bool = False) -> None:
    """Log how many of the prompts are longer than the text encoders read; `name` is the source's.

    first_batch: they are a stream's first ones, of which no more is known.
    """
    texts = list(dict.fromkeys(prompts))[:LOOKED_AT]
    limit = backbone.token_limit
    # A token is one byte at least, and two more mark the beginning and the end.
    long = [text for text in texts if len(text.encode(errors="replace")) > limit - 2]
    cut = [text for text, tokens in zip(long, backbone.read_tokens(long), strict=True) if tokens.is_cut] if long else []
    if not cut:
        return
    among = "the first batch's" if first_batch else "the first" if len(texts) == LOOKED_AT else "its"
    log.warning(
        "%s: %d of %s %d different captions are longer than the %d tokens that the text encoders read; the rest of "
        "each is cut off, as in '%.60s…'",
        name,
        len(cut),
        among,
        len(texts),
        limit,
        cut[0],
    )

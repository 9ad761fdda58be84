"""Bounds that options share; imports nothing, so that the command line stays quick."""

MAX_SEED = 2**63 - 1
"""What every generator takes, and some room above it: picture i is drawn from seed + i."""
MAX_NUMBER = 10**9
"""The largest whole number that an option takes, except seeds: what is larger is a slip, and overflows somewhere."""
MAX_BATCH = 2**16
"""Rows of a batch, and images that are drawn at once."""
MAX_IMAGES = 10**6
"""Images of an evaluation."""
MAX_RESOLUTION = 8192
"""Pixels per side."""
MAX_SAMPLING_STEPS = 1000
"""The noise levels that the base models were trained on; diffusers' samplers have no more steps."""

"""Bounds that options share; imports nothing, so that the command line stays quick."""

MAX_SEED = 2**63 - 1
"""What every generator takes, and some room above it: picture i is drawn from seed + i."""
MAX_SAMPLING_STEPS = 1000
"""The noise levels that the base models were trained on; diffusers' samplers have no more steps."""

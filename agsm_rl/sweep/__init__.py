"""Sweeps: one recipe over axes and seeds, each cell an ordinary run folder (docs/sweeps.md)."""

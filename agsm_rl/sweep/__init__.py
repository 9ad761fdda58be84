"""Sweeps: one recipe over axes and seeds; each cell is an ordinary run folder (docs/sweeps.md)."""

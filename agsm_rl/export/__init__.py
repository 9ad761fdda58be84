"""Adapters in and out."""

"""Suites that measure what a model draws, intervals, and tables: always the same prompts and the same noise."""

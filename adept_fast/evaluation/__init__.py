"""Measure what a model gained and what it lost."""

"""Expand a model with silent copies of chosen layers, in memory or on disk, and edit, verify and export the result."""

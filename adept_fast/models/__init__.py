"""A transformers model in memory: its layers, its head and losses, its per-layer config, and what makes a copy of a layer silent.

No other room treats one model family differently from another. This room acts on a model's structure, not on its name, wherever the
structure tells.
"""

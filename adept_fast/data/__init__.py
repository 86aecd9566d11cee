"""Corpora: sources, readers, records, items, splits, documents, packed blocks, streams."""

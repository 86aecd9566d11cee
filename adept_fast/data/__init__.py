"""What a corpus is: sources, items, splits, documents, blocks."""

"""Cross-entropy of a linear head, without storing its logits."""

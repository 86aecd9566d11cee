"""The AdamW update of a list of tensors."""

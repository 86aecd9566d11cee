"""Sums of gradients."""

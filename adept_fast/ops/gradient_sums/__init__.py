"""Sums of gradients over all dimensions but one."""

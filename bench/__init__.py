"""Benchmarks: `python -m bench NAME [--save] [options]`, or `all`."""

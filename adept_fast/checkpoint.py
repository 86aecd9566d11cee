"""A model on disk: found, checked, hashed, loaded, and saved whole or not at all. safetensors only; no pickle is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from adept_fast.artefacts import read_json, staged_folder
from adept_fast.errors import InputError
from adept_fast.record import FILE as RECORD
from adept_fast.record import AdeptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
IDENTITY = ("config.json", "tokenizer", "vocab", "merges", "chat_template", "added_tokens", "special_tokens")  # beginnings of names
NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
NOT_CARRIED_NAMES = ("config.json", INDEX, RECORD)


def resolve(name_or_path: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, checked, or a hub name's snapshot. Raises InputError."""
    folder = Path(name_or_path).expanduser()
    if not folder.exists():
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
            raise InputError(f"{name_or_path}: no such model folder (a model on the hub is named owner/name)")
        folder = _snapshot(name_or_path, revision)
    check(folder)
    return folder


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.onnx"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{name}: neither a folder nor a model on the hub that can be reached ({str(error).splitlines()[0]})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index lists them."""
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{folder / INDEX}: holds no weight_map: fetch the checkpoint again")
        return sorted(folder / name for name in set(shards.values()))
    return [folder / WEIGHTS]


def check(folder: Path) -> None:
    """Raise InputError unless `folder` holds a config and whole safetensors files."""
    if not folder.is_dir():
        raise InputError(f"{folder}: not a model folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json: not a model folder, or a truncated one")
    if read_json(folder / "config.json").get("quantization_config"):
        raise InputError(f"{folder}: quantised checkpoints cannot be expanded: use the unquantised one")
    for file in weight_files(folder):
        if not file.is_file():
            pickled = next(folder.glob("*.bin"), None)
            hint = f"; {pickled.name} is a pickle and is not loaded: convert it to safetensors" if pickled else ""
            raise InputError(f"{file}: missing{hint}")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: corrupt or truncated ({error}): fetch it again") from None


def fingerprint(folder: Path) -> str:
    """sha256 over config, weights and tokenizer files: what identifies a source."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix in (".safetensors", ".model") or file.name.startswith(IDENTITY)):
            with file.open("rb") as stream:
                digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def positions(folder: Path) -> int:
    """The most tokens the model takes (max_position_embeddings), or 2^20 where its config sets no limit."""
    config = read_json(folder / "config.json")
    limits = [table.get(key) for table in (config, config.get("text_config") or {}) for key in POSITIONS]
    return next(filter(None, limits), 1 << 20)


def differing_tensors(one: Path, other: Path, rename: Callable[[str], str] = str) -> list[str]:
    """Names of the tensors of `one` whose counterpart in `other`, under its renamed name, has other bits.

    Tensors without a counterpart (one of two tied ones, say) and tensors kept in another dtype are not compared.
    """
    files = [{name: file for file in weight_files(folder) for name in _names(file)} for folder in (one, other)]
    differing = []
    for name in sorted(files[0]):
        twin = rename(name)
        if twin in files[1]:
            with safe_open(files[0][name], framework="pt") as first, safe_open(files[1][twin], framework="pt") as second:
                tensors = first.get_tensor(name).flatten(), second.get_tensor(twin).flatten()
            if tensors[0].dtype == tensors[1].dtype and not torch.equal(tensors[0].view(torch.uint8), tensors[1].view(torch.uint8)):
                differing.append(name)
    return differing


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def load_model(
    folder: Path, dtype: str | None = None, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model in eval mode, in the checkpoint's dtype unless told; its adept_config, if any, is attached."""
    from transformers import AutoModelForCausalLM

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype must be a torch dtype such as float32 or bfloat16, found {dtype!r}")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they come back in the loading info, and are refused below by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    missing = sorted(info["missing_keys"]) + sorted(str(entry) for entry in info["mismatched_keys"])
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing or of another shape, first {missing[0]}: fetch it again")
    if torch.cuda.is_available():
        model.to("cuda")
    if (folder / RECORD).is_file():
        model.adept_config = AdeptConfig.load(folder)
    return model.eval()


def load_skeleton(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights (meta tensors): enough to see its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot be loaded ({str(error).strip().splitlines()[0]})") from None


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}: no tokenizer can be loaded ({str(error).strip().splitlines()[0]})") from None
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # packing cuts, nothing is fed whole
    return tokenizer


def save(
    model: PreTrainedModel,
    carried_from: Path,
    target: Path,
    extra: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    prove: Callable[[Path], None] | None = None,
) -> None:
    """Write a whole checkpoint to `target`, which must not exist: weights, config, record, and the other files of `carried_from`.

    extra: further safetensors files, name -> tensors. prove: called with the written folder before it gets its final name; what it
    raises leaves no target. Staged and renamed: a killed or failed save leaves nothing by the final name.
    """
    from safetensors.torch import save_file

    with staged_folder(target) as staging:
        use_cache, model.config.use_cache = model.config.use_cache, True
        try:
            model.save_pretrained(staging)
        finally:
            model.config.use_cache = use_cache
        for file in sorted(carried_from.iterdir()):
            if file.is_file() and not file.name.endswith(NOT_CARRIED) and file.name not in NOT_CARRIED_NAMES:
                shutil.copyfile(file, staging / file.name)
        model.adept_config.save(staging)
        for name, tensors in (extra or {}).items():
            save_file(dict(tensors), staging / name)
        if prove:
            prove(staging)

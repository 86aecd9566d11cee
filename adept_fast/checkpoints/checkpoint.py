"""A model on disk: found, checked and loaded. safetensors only; no pickle is loaded."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from adept_fast.checkpoints.adept_config import FILE as RECORD
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.config_bounds import check_counts, check_sizes
from adept_fast.checkpoints.safetensors_index import INDEX, WEIGHTS, open_shards
from adept_fast.errors import InputError
from adept_fast.models.causality import require_causal
from adept_fast.models.decoder_layers import decoder_layers, require_decoder_only, vocabulary_of
from adept_fast.runtime.input_files import read_json, regular
from adept_fast.settings.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("bfloat16", "float16", "float32", "float64")
OF_THE_MACHINE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
NOT_CARRIED_NAMES = ("config.json", RECORD)
CARRIED_FOLDERS = ("additional_chat_templates",)


def resolve(name_or_path: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, checked, or a hub name's snapshot. Raises InputError."""
    folder = Path(name_or_path).expanduser()
    if os.path.exists(folder):  # False for a name that is too long, too
        if revision is not None:
            raise InputError(f"revision={revision}: {name_or_path} is a folder, which has one state only: leave it out")
    else:
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


def check(folder: Path) -> None:
    """Raise InputError unless `folder` holds a config and whole safetensors files."""
    if not folder.is_dir():
        raise InputError(f"{folder}: not a model folder")
    for entry in folder.iterdir():
        if not entry.is_dir():
            regular(entry)  # a link to nothing, of a damaged cache, would be taken for a file that the model does without
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json: not a model folder, or a truncated one")
    config = read_json(folder / "config.json")
    if _holds_nan(config):
        raise InputError(f"{folder / 'config.json'}: holds a NaN: correct it, or fetch it again")
    if config.get("quantization_config") or config.get("compression_config"):
        raise InputError(f"{folder}: quantised: its packed weights cannot be made silent or trained: use the unquantised checkpoint")
    if not (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        pickled = next(folder.glob("*.bin"), None)
        hint = f"{pickled.name} is a pickle and is not loaded: convert it to safetensors" if pickled else "fetch the checkpoint again"
        raise InputError(f"{folder / WEIGHTS}: missing: {hint}")
    open_shards(folder)


def _holds_nan(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_nan, value.values() if isinstance(value, dict) else value))
    return value != value


def positions(folder: Path) -> int:
    """The most tokens the model takes (max_position_embeddings), or 2^20 where its config sets no limit."""
    config = read_json(folder / "config.json")
    limits = [table.get(key) for table in (config, config.get("text_config") or {}) for key in POSITIONS]
    return next(filter(None, limits), 1 << 20)


def load_model(
    folder: Path, dtype: str | None = None, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model in eval mode, in the checkpoint's dtype unless told; its adept_config, if any, is attached."""
    from transformers import AutoModelForCausalLM

    if dtype is not None:
        require("dtype", dtype, str, DTYPES)
    load_skeleton(folder, trust_remote_code, attn_implementation)
    with _refused_by_name(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they come back in the loading info, and are refused below by name
            output_loading_info=True,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(entry) for entry in info["mismatched_keys"])
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing or of another shape, first {missing[0]}: fetch it again")
    if torch.cuda.is_available():
        model.to("cuda")
    record = AdeptConfig.find(folder)
    if record is not None:
        record.require_layers(len(decoder_layers(model)), folder)
        model.adept_config = record
    require_causal(model)
    whole: PreTrainedModel = model.eval()
    return whole


def load_skeleton(folder: Path, trust_remote_code: bool = False, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model without its weights (meta tensors): enough to see its layers, and whether it has the implementation of attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shards = open_shards(folder)
    check_counts(read_json(folder / "config.json"), shards)  # before transformers makes lists of so many layers
    with _refused_by_name(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        require_decoder_only(config)
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    check_sizes(skeleton, shards)
    if attn_implementation is not None:
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation)
        except _refusals() as error:
            raise InputError(f"attn_implementation={attn_implementation} cannot be had: {_reason(error)}") from None
    return skeleton


def _refusals() -> tuple[type[Exception], ...]:
    """What transformers raises for a config.json that describes no model: most fields are used before anything checks them."""
    from huggingface_hub.errors import StrictDataclassError

    values = ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError
    return StrictDataclassError, SafetensorError, OSError, RuntimeError, ImportError, *values


@contextmanager
def _refused_by_name(folder: Path) -> Iterator[None]:
    """What transformers refuses becomes an InputError that names the folder; what the machine refuses stays what it is."""
    try:
        yield
    except InputError:
        raise
    except _refusals() as error:
        if (isinstance(error, OSError) and error.errno in OF_THE_MACHINE) or "can't allocate memory" in str(error):
            raise
        raise InputError(f"{folder}: cannot be loaded ({_reason(error)}): correct its config.json, or fetch it again") from None


def _reason(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= 300 else f"{reason[:297]}..."


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a text")  # what its files have wrong shows where they are used
    except Exception as error:  # tokenizers raises Exception itself
        if type(error) is not Exception and not isinstance(error, _refusals()):
            raise
        raise InputError(f"{folder}: no tokenizer can be loaded ({_reason(error)}): fetch its tokenizer files again") from None
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # packing cuts, nothing is fed whole
    return tokenizer


def carried(folder: Path) -> list[Path]:
    """What goes along unchanged with the weights: tokenizer, generation config, chat templates, licence, model card, code."""
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.endswith(NOT_CARRIED)]
    files += [file for name in CARRIED_FOLDERS for file in (folder / name).glob("*") if file.is_file()]
    return sorted(file for file in files if file.name not in NOT_CARRIED_NAMES)


def carry_files(source: Path, target: Path) -> None:
    for file in carried(source):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)


def require_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise InputError for a tokenizer with tokens that the model has no embedding of."""
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, vocabulary_of(model)
    if tokens > rows:
        raise InputError(
            f"{folder}: its tokenizer has {tokens} tokens, its embeddings {rows}: copies cannot learn new tokens, because embeddings are "
            "frozen: take the model's own tokenizer, or resize and train the embeddings before expanding"
        )

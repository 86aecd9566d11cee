"""Find, check and load a model on disk. Only safetensors are read, never pickles."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from adept_fast.checkpoints.adept_config import FILE as RECORD
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.config_bounds import check_counts, check_sizes
from adept_fast.checkpoints.safetensors_index import INDEX, WEIGHTS, Shards, open_shards
from adept_fast.checkpoints.settings import DTYPES
from adept_fast.errors import InputError
from adept_fast.models.causality import require_causal
from adept_fast.models.decoder_layers import decoder_layers, require_decoder_only, vocabulary_of
from adept_fast.runtime.input_files import read_json, regular
from adept_fast.settings.validation import require, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OF_THE_MACHINE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
NOT_CARRIED_NAMES = ("config.json", "README.md", RECORD)  # the card is written anew
CARRIED_FOLDERS = ("additional_chat_templates",)


class ModelFolder:
    """A model on disk. Each file is read once, on first use. `os.fspath` and `str` return the path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._skeletons: dict[tuple[bool, str | None], PreTrainedModel] = {}

    @classmethod
    def of(cls, given: str | os.PathLike[str]) -> ModelFolder:
        return given if isinstance(given, cls) else cls(Path(given))

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Return the content of config.json. Raises InputError if it is not valid JSON."""
        return cast(Mapping[str, Any], read_json(self.path / "config.json"))

    @cached_property
    def shards(self) -> Shards:
        return open_shards(self.path)

    @cached_property
    def record(self) -> AdeptConfig | None:
        """Return the record of an expanded model, or None."""
        return AdeptConfig.find(self.path, self.config)

    @property
    def positions(self) -> int:
        """Return the longest input in tokens (max_position_embeddings), or 2^20 if the config sets no limit."""
        limits = [table.get(key) for table in (self.config, self.config.get("text_config") or {}) for key in POSITIONS]
        return next(filter(None, limits), 1 << 20)

    def skeleton(self, trust_remote_code: bool = False, attn_implementation: str | None = None) -> PreTrainedModel:
        """Build the model on meta tensors, which shows its layers and whether it supports an attention implementation."""
        require("trust_remote_code", trust_remote_code, bool)
        asked = (trust_remote_code, attn_implementation)
        if asked not in self._skeletons:
            self._skeletons[asked] = _skeleton(self, *asked)
        return self._skeletons[asked]


def resolve(name_or_path: str | os.PathLike[str], revision: str | None = None, name: str = "model") -> ModelFolder:
    """Return the checked folder of a checkpoint, local or a snapshot from the hub.

    Raises InputError if there is none, under `name` for what is no path.
    """
    if isinstance(name_or_path, ModelFolder):
        return name_or_path
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(f"{name} must be a model's folder or hub name, found {shown(name_or_path)}", name)
    name_or_path = str(name_or_path)
    folder = Path(os.path.expanduser(name_or_path))
    if os.path.exists(folder):  # also False for a name that is too long
        if revision is not None:
            raise InputError(f"revision={revision}: {name_or_path} is a folder, which has one state only: leave it out")
    else:
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
            raise InputError(f"{name_or_path}: no such model folder (a model on the hub is named owner/name)")
        folder = _snapshot(name_or_path, revision)
    found = ModelFolder(folder)
    check(found)
    return found


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.onnx"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{name}: neither a folder nor a model on the hub that can be reached ({str(error).splitlines()[0]})") from None


def check(model: ModelFolder) -> None:
    """Raise InputError unless the folder holds a config and whole safetensors files."""
    folder = model.path
    if not folder.is_dir():
        raise InputError(f"{folder}: not a model folder")
    for entry in folder.iterdir():
        if not entry.is_dir():
            regular(entry)  # a broken link in a damaged cache would pass for an optional file that is absent
    if not (folder / "config.json").is_file():
        if (folder / "tuned" / "config.json").is_file():
            raise InputError(f"{folder}: the output_dir of a run: its model is {folder / 'tuned'}")
        raise InputError(f"{folder}: no config.json: not a model folder, or a truncated one")
    config = model.config
    if _holds_nan(config):
        raise InputError(f"{folder / 'config.json'}: holds a NaN: correct it, or fetch it again")
    if config.get("quantization_config") or config.get("compression_config"):
        raise InputError(f"{folder}: quantised: its packed weights cannot be made silent or trained: use the unquantised checkpoint")
    if not (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        pickled = next(folder.glob("*.bin"), None)
        hint = f"{pickled.name} is a pickle and is not loaded: convert it to safetensors" if pickled else "fetch the checkpoint again"
        raise InputError(f"{folder / WEIGHTS}: missing: {hint}")
    _ = model.shards


def _holds_nan(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_nan, value.values() if isinstance(value, dict) else value))
    return value != value


def load_model(
    folder: str | os.PathLike[str], dtype: str | None = None, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model in eval mode and attach its adept_config, if any. dtype: by default that of the checkpoint."""
    from transformers import AutoModelForCausalLM

    if dtype is not None:
        require("dtype", dtype, str, DTYPES)
    folder = ModelFolder.of(folder)
    folder.skeleton(trust_remote_code, attn_implementation)  # refuses what cannot be loaded before the weights are read
    with _refused_by_name(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the loading info lists them, and they are refused below by name
            output_loading_info=True,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(entry) for entry in info["mismatched_keys"])
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing or of another shape, first {missing[0]}: fetch it again")
    if torch.cuda.is_available():
        model.to("cuda")
    if folder.record is not None:
        folder.record.require_layers(len(decoder_layers(model)), folder.path)
        model.adept_config = folder.record
    require_causal(model)
    whole: PreTrainedModel = model.eval()
    return whole


def _skeleton(folder: ModelFolder, trust_remote_code: bool, attn_implementation: str | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    shards = folder.shards
    check_counts(folder.config, shards)  # before transformers makes lists of so many layers
    with _refused_by_name(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
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
    """Return the exceptions that transformers raises for an invalid config.json, most fields of which it uses unchecked."""
    from huggingface_hub.errors import StrictDataclassError

    values = ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError
    return StrictDataclassError, SafetensorError, OSError, RuntimeError, ImportError, *values


@contextmanager
def _refused_by_name(folder: ModelFolder) -> Iterator[None]:
    """Turn exceptions of transformers into an InputError that names the folder; let errors of the machine pass."""
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


def load_tokenizer(folder: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), trust_remote_code=trust_remote_code)
        tokenizer("a text")  # errors in its files show only in use
    except Exception as error:  # tokenizers raises Exception itself
        if type(error) is not Exception and not isinstance(error, _refusals()):
            raise
        raise InputError(f"{folder}: no tokenizer can be loaded ({_reason(error)}): fetch its tokenizer files again") from None
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # no warning: packing cuts long texts
    return tokenizer


def carried(folder: Path) -> list[Path]:
    """List the files to copy along with the weights: tokenizer, generation config, chat templates, licence, code."""
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.endswith(NOT_CARRIED)]
    files += [file for name in CARRIED_FOLDERS for file in (folder / name).glob("*") if file.is_file()]
    return sorted(file for file in files if file.name not in NOT_CARRIED_NAMES)


def carry_files(source: Path, target: Path) -> None:
    for file in carried(source):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)


def require_vocabulary(folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise InputError for a tokenizer with more tokens than the model has embeddings."""
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, vocabulary_of(model)
    if tokens > rows:
        raise InputError(
            f"{folder}: its tokenizer has {tokens} tokens, its embeddings {rows}: copies cannot learn new tokens, because embeddings are "
            "frozen: take the model's own tokenizer, or resize and train the embeddings before expanding"
        )

"""Match names of tensors on disk with names in memory: the layer a stored tensor belongs to, and the parameters it becomes.

They differ if a checkpoint holds the base model only (no prefix), or if transformers converts while loading (one tensor per expert on disk,
one 3-D parameter in memory). Every name goes through transformers' own mapping; nothing is guessed from substrings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

from torch import nn

from adept_fast.checkpoints.safetensors_index import FLOATS, Shards, Stored
from adept_fast.errors import InputError, UnsupportedFamilyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUMBER = re.compile(r"0|[1-9][0-9]{0,5}", re.ASCII)


class Naming:
    """Names of one checkpoint. skeleton: the model that they load into, of meta tensors; layers: the path of its layers."""

    def __init__(self, skeleton: PreTrainedModel, layers: str, names: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(skeleton)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._targets = {source: entry.target_patterns for entry in self._converters for source in entry.source_patterns}
        self._skeleton, self._known, self._path = skeleton, skeleton.state_dict(), f"{layers}."
        self._parameters = {parameter for parameter, _ in skeleton.named_parameters(remove_duplicate=False)}
        self.count = len(cast(nn.ModuleList, skeleton.get_submodule(layers)))
        self._converted: set[str] = set()
        self._in_memory = {name: self._loads_into(name) for name in names}
        self._prefixes = sorted({prefix for name in self._in_memory if (prefix := self._prefix(name)) is not None})

    def _loads_into(self, name: str) -> tuple[str, ...]:
        """Return the parameters and buffers that a stored tensor becomes, or is a part of; none if the model does not have it."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._skeleton.base_model_prefix
        found, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._known)
        if found not in self._known and name in self._known:
            found, pattern = name, None
        if found not in self._known:
            return ()
        if pattern is not None:
            self._converted.add(name)
        targets = () if pattern is None else self._targets.get(pattern, ())
        stem = next((found.removesuffix(target) for target in targets if found.endswith(target)), None)
        others = [f"{stem}{target}" for target in targets] if stem is not None else []
        return tuple(dict.fromkeys([found, *(other for other in others if other in self._known)]))

    def _prefix(self, name: str) -> str | None:
        """Return the part of a name before its layer index, which is the part that selects the layer when it is changed."""
        into = self._in_memory[name]
        layer = self._layer_in_memory(into[0]) if into else None
        if layer is None:
            return None
        parts, other = name.split("."), str((layer + 1) % self.count)
        places = [at for at, part in enumerate(parts) if part == str(layer)]
        for at in places:
            moved = self._loads_into(".".join([*parts[:at], other, *parts[at + 1 :]]))
            if self.count == 1 or (moved and self._layer_in_memory(moved[0]) == int(other)):
                return "".join(f"{part}." for part in parts[:at])
        raise UnsupportedFamilyError(f"{self._skeleton.config.model_type}: cannot be expanded on disk: {name} does not name its layer")

    def _layer_in_memory(self, name: str) -> int | None:
        index = name.removeprefix(self._path).partition(".")[0]
        return int(index) if name.startswith(self._path) and NUMBER.fullmatch(index) else None

    def _split(self, name: str) -> tuple[str, int, str] | None:
        for prefix in self._prefixes:
            index, _, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and NUMBER.fullmatch(index):
                return prefix, int(index), rest
        return None

    def layer(self, name: str) -> int | None:
        """Return the layer of a stored tensor; None outside the layers. Multi-token prediction layers are numbered past the last."""
        split = self._split(name)
        return split[1] if split else None

    def place(self, name: str) -> tuple[int | None, str]:
        """Return (layer, name within it), which is independent of the prefix; (None, name) outside the layers."""
        split = self._split(name)
        return split[1:] if split else (None, name)

    def plain_parameter(self, name: str) -> str | None:
        """Return the parameter with the elements of a stored tensor; None if the tensor is converted while loading, or not loaded."""
        into = self._in_memory[name]
        return into[0] if into and name not in self._converted else None

    @property
    def plain(self) -> set[str]:
        """Return all parameters that are stored without conversion."""
        return {parameter for name in self._in_memory if (parameter := self.plain_parameter(name)) is not None}

    def of_parameter(self, name: str) -> bool:
        """Whether a stored tensor becomes a parameter or a part of one; otherwise it is a buffer (a mask, for example) or not read."""
        return any(into in self._parameters for into in self._in_memory[name])

    def moved(self, name: str, layer: int) -> str:
        """Return the name of the same tensor in another layer."""
        prefix, _, rest = self._split(name) or ("", 0, "")
        return f"{prefix}{layer}.{rest}"

    def fill(self, name: str, silent: Mapping[str, float]) -> float | None:
        """Return the value to fill a tensor with in a silent copy of its layer; None if it is copied unchanged.

        silent: name within the layer, in memory -> value. Conversions only move elements, so a constant tensor stays constant.
        """
        values = {silent.get(into.removeprefix(self._path).partition(".")[2]) for into in self._in_memory[name]} or {None}
        if len(values) > 1:
            raise UnsupportedFamilyError(
                f"{self._skeleton.config.model_type}: cannot be expanded on disk: only a part of {name} is to be silenced"
            )
        return values.pop()

    def check(self, shards: Shards) -> None:
        """Raise InputError if config.json and the tensors disagree: missing tensors, other shapes, too many layers."""
        folder, tied = shards.folder, getattr(self._skeleton, "all_tied_weights_keys", None) or {}
        stored = shards.tensors
        sources: dict[str, list[Stored]] = {}
        for name, into in self._in_memory.items():
            for parameter in into:
                sources.setdefault(parameter, []).append(stored[name])
        held = {*sources, *(name for pair in tied.items() if not sources.keys().isdisjoint(pair) for name in pair)}
        optional = [*(self._skeleton._keys_to_ignore_on_load_missing or ())]
        missing = sorted(name for name in self._known.keys() - held if not any(re.search(pattern, name) for pattern in optional))
        if missing:
            raise InputError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}: fetch it again, or correct config.json")
        for parameter, parts in sources.items():
            self._check_parameter(folder, parameter, parts)
        ignored = [*(self._skeleton._keys_to_ignore_on_load_unexpected or ())]
        for name, into in self._in_memory.items():
            layer = self.layer(name)
            if layer is not None and layer >= self.count and not into and not any(re.search(pattern, name) for pattern in ignored):
                raise InputError(f"{folder}: config.json has {self.count} layers, but there is {ascii(name)}: correct one of them")

    def _check_parameter(self, folder: object, parameter: str, parts: list[Stored]) -> None:
        expected = self._known[parameter]
        first = parts[0]
        if expected.dtype.is_floating_point and first.dtype not in FLOATS:
            raise InputError(f"{folder}: {ascii(first.name)} is {first.dtype}: quantised, or corrupt: use an unquantised checkpoint")
        numel = sum(part.numel for part in parts)
        whole = sum(self._known[into].numel() for into in self._in_memory[first.name])
        if numel != whole or (first.name not in self._converted and tuple(expected.shape) != first.shape):
            raise InputError(
                f"{folder}: {parameter} has another shape, {list(first.shape)}, than config.json gives it, {list(expected.shape)}: "
                "correct one of them"
            )

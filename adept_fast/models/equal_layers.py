"""Compare the layers that an expanded config builds with those of the base, to find by name what depends on a layer's index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adept_fast.errors import UnsupportedFamilyError
from adept_fast.models.decoder_layers import decoder_layers, layers_path, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = (bool, int, float, str, tuple, list, type(None))
IDLE = {"store_full_length_kv": "is_kv_shared_layer"}
"""Flag -> the flag that gives it an effect: stored keys and values matter only if some layer reuses them."""


def require_same_layers(base: PreTrainedModel, expanded: PreTrainedModel, sources: Sequence[int]) -> None:
    """Raise UnsupportedFamilyError, naming what differs, unless layer j of `expanded` is built as layer sources[j] of `base`.

    Compared are modules, shapes of parameters, computed buffers and plain attributes of modules. Exempt are a layer's own index, and
    attributes equal to the config field of that name. Outside the layers, shapes must agree. Meta tensors suffice, but hide the values of
    buffers.
    """
    family, configs = base.config.model_type, (text_config(base), text_config(expanded))
    own, built = decoder_layers(base), decoder_layers(expanded)
    ids = [{id(parameter) for parameter in layer.parameters()} for layer in own]
    if sum(map(len, ids)) > len(set().union(*ids)):
        raise UnsupportedFamilyError(f"{family}: cannot be expanded: its layers share parameters")
    idle = {flag for flag, user in IDLE.items() if not any(getattr(module, user, False) for module in built.modules())}
    for index, source in enumerate(sources):
        found = _difference(own[source], built[index], (source, index), configs, idle)
        if found:
            raise UnsupportedFamilyError(f"{family}: cannot be expanded: {found} depends on the layer's index (layer {source})")
    prefix = layers_path(base) + "."
    shapes = [
        {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False) if not name.startswith(prefix)}
        for model in (base, expanded)
    ]
    for name in sorted(set(shapes[0]) | set(shapes[1])):
        if shapes[0].get(name) != shapes[1].get(name):
            raise UnsupportedFamilyError(f"{family}: cannot be expanded: {name} depends on the number of layers")


def _difference(
    own: nn.Module, built: nn.Module, indices: tuple[int, int], configs: tuple[Any, Any], idle: Collection[str]
) -> str | None:
    """Return the name of the first difference between two layers."""
    modules = dict(built.named_modules())
    for path, module in own.named_modules():
        twin = modules.pop(path, None)
        if type(module) is not type(twin):
            return f"the kind of {path or 'layer'}"
        for kind in ("_parameters", "_buffers"):
            mine, other = getattr(module, kind), getattr(twin, kind)
            for name in {**other, **mine}:
                if not _agree(mine.get(name), other.get(name), kind == "_buffers" and name in module._non_persistent_buffers_set):
                    return f"{path}.{name}".lstrip(".")
        for name, value in vars(module).items():
            other = vars(twin).get(name)
            if name.startswith("_") or name == "training" or name in idle or not isinstance(value, PLAIN) or value == other:
                continue
            if (value, other) == indices and not isinstance(value, bool):
                continue
            if (value, other) != tuple(getattr(config, name, None) for config in configs):
                return f"{path}.{name}".lstrip(".")
    return next(iter(modules), None)


def _agree(one: Tensor | None, other: Tensor | None, computed: bool) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape:
        return False
    return not computed or one.is_meta or other.is_meta or bool((other.to(one) == one).all())

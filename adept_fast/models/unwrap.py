"""Find the transformers model in a caller's argument: unwrap wrappers that compute the same, refuse everything else with the remedy.

torch.compile, DataParallel and DistributedDataParallel only call the model that they hold, so they are unwrapped. Adapters are refused: the
base weights alone would be scored and copied, without the trained adapters.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from adept_fast.errors import InputError, UnsupportedFamilyError
from adept_fast.models.decoder_layers import require_decoder_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOAD = "AutoModelForCausalLM.from_pretrained"
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "NextSentencePrediction")


def bare(model: nn.Module) -> Any:
    """Unwrap torch.compile, DataParallel and DistributedDataParallel, in any order; return other modules unchanged."""
    while (inner := _wrapped(model)) is not model:
        model = inner
    return model


def unwrapped(model: Any, name: str = "model") -> PreTrainedModel:
    """Return the causal language model in a public function's argument `name`.

    Raises InputError for anything but a transformers model, for adapters and for flattened parameters, and UnsupportedFamilyError for a
    model that is not a decoder with a language-model head.
    """
    from transformers import PreTrainedModel

    if isinstance(model, nn.Module):
        model = bare(model)
    if _instance(model, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        raise InputError(f"{name}: FSDP1 flattens its parameters: pass the model before it is wrapped, or shard it by FSDP2 (fully_shard)")
    if _instance(model, "peft", "PeftModel"):
        if model.active_peft_config.is_prompt_learning:
            raise InputError(f"{name}: a PEFT model, whose prompt no weights can hold: pass {name}.get_base_model(), which is without it")
        raise InputError(f"{name}: a PEFT model, whose adapters are not in its weights: pass {name}.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{name} must be a causal language model of transformers, found {_found(model, name)}")
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    adapted = tuners and next((path for path, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)), None)
    if adapted:
        raise InputError(
            f"{name}: PEFT adapters were injected ({adapted}): merge them into the weights first (merge_and_unload of a PeftModel), or "
            f"load the model without them by {LOAD}"
        )
    require_decoder_only(model.config)
    kind = type(model).__name__
    if kind.endswith(tuple(f"For{task}" for task in TASKS)) or (kind.endswith("Model") and model.get_output_embeddings() is None):
        raise UnsupportedFamilyError(f"{name}: {kind} has no language-model head: load it by {LOAD}")
    return model


def _wrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    return getattr(model, "_orig_mod", model)


def _instance(model: object, module: str, name: str) -> bool:
    """Whether an object is of a class whose module may not be imported; if it is not, no object is."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(model, kind)


def _found(given: Any, name: str) -> str:
    """Describe the given object, and name what to pass instead."""
    from transformers import PreTrainedModel

    if isinstance(given, str) or hasattr(given, "__fspath__"):
        return f"the path or name {str(given)!r}: load it by {LOAD}({str(given)!r})"
    held = next((key for key in ("module", "model") if isinstance(getattr(given, key, None), PreTrainedModel)), None)
    return type(given).__name__ + (f": pass {name}.{held}" if held else f": load one by {LOAD}")

"""ADEPT: score the layers of a causal language model, copy the least critical ones, tune only the copies with a learning rate per unit.

Public names are imported at their first use. `import adept_fast` alone imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adept_fast.errors import ExpansionError, InputError, UnsupportedFamilyError
    from adept_fast.expansion.delta import apply_copies, extract_copies
    from adept_fast.expansion.dial import dial
    from adept_fast.expansion.expand_checkpoint import expand_checkpoint
    from adept_fast.expansion.expand_model import expand_model, freeze_original
    from adept_fast.expansion.merge import merge_copies
    from adept_fast.expansion.remove import remove_copies
    from adept_fast.expansion.verify import verify_expansion
    from adept_fast.optim import AdamW, OffloadedAdamW, param_groups
    from adept_fast.scoring.method_comparison import compare_scores
    from adept_fast.scoring.race import Race
    from adept_fast.scoring.score_layers import score_layers
    from adept_fast.scoring.scores import LayerScores, UnitScores
    from adept_fast.scoring.select_layers import select_layers
    from adept_fast.scoring.stability import corpus_conflicts, selection_stability
    from adept_fast.scoring.unit_importance import score_units
    from adept_fast.scoring.unit_masking import mask_units
    from adept_fast.scoring.units import Units
    from adept_fast.tuning.adept_callback import AdeptCallback
    from adept_fast.tuning.adept_trainer import AdeptTrainer
    from adept_fast.tuning.fast_step import fast_step
    from adept_fast.tuning.kl_anchor import Anchor
    from adept_fast.tuning.unit_rates import apply_rates, unit_rates

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "AdeptCallback",
    "AdeptTrainer",
    "Anchor",
    "ExpansionError",
    "InputError",
    "LayerScores",
    "OffloadedAdamW",
    "Race",
    "UnitScores",
    "Units",
    "UnsupportedFamilyError",
    "apply_copies",
    "apply_rates",
    "compare_scores",
    "corpus_conflicts",
    "dial",
    "expand_checkpoint",
    "expand_model",
    "extract_copies",
    "fast_step",
    "freeze_original",
    "mask_units",
    "merge_copies",
    "param_groups",
    "remove_copies",
    "score_layers",
    "score_units",
    "select_layers",
    "selection_stability",
    "unit_rates",
    "verify_expansion",
]

_MODULES = {
    name: module
    for module, names in {
        "adept_fast.errors": "ExpansionError InputError UnsupportedFamilyError",
        "adept_fast.expansion.delta": "apply_copies extract_copies",
        "adept_fast.expansion.dial": "dial",
        "adept_fast.expansion.expand_checkpoint": "expand_checkpoint",
        "adept_fast.expansion.expand_model": "expand_model freeze_original",
        "adept_fast.expansion.merge": "merge_copies",
        "adept_fast.expansion.remove": "remove_copies",
        "adept_fast.expansion.verify": "verify_expansion",
        "adept_fast.optim": "AdamW OffloadedAdamW param_groups",
        "adept_fast.scoring.method_comparison": "compare_scores",
        "adept_fast.scoring.race": "Race",
        "adept_fast.scoring.score_layers": "score_layers",
        "adept_fast.scoring.scores": "LayerScores UnitScores",
        "adept_fast.scoring.select_layers": "select_layers",
        "adept_fast.scoring.stability": "corpus_conflicts selection_stability",
        "adept_fast.scoring.unit_importance": "score_units",
        "adept_fast.scoring.unit_masking": "mask_units",
        "adept_fast.scoring.units": "Units",
        "adept_fast.tuning.adept_callback": "AdeptCallback",
        "adept_fast.tuning.adept_trainer": "AdeptTrainer",
        "adept_fast.tuning.fast_step": "fast_step",
        "adept_fast.tuning.kl_anchor": "Anchor",
        "adept_fast.tuning.unit_rates": "apply_rates unit_rates",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("adept_fast"):
            raise
        raise ModuleNotFoundError(f"adept_fast.{name} needs {error.name}: pip install 'adept-fast[hf]'", name=error.name) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Losses of single items: compared pair by pair between two models, and kept in eval.items.safetensors beside eval.json.

The file has a tensor MODEL.CORPUS.sums (summed loss of each item, nats, fp64), .tokens (its supervised tokens, int64) and, for questions,
.right (1 where the model picked the right letter, fp64).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path

import torch
from torch import Tensor

from adept_fast.evaluation.results import AGAIN, Change, CorpusChange, EvaluationResults
from adept_fast.runtime.atomic_files import staged_file
from adept_fast.runtime.bootstrap import bootstrap
from adept_fast.runtime.input_files import as_input_error, regular


@dataclass(frozen=True)
class ItemLosses:
    """Losses of n items.

    sums: nats, fp64 [n]. tokens: supervised ones, int64 [n]. right: 1 for a right answer, else 0, fp64 [n]; None for texts
    """

    sums: Tensor
    tokens: Tensor
    right: Tensor | None = None

    def change(self, base: ItemLosses) -> CorpusChange:
        """Return the change against another model's losses of the same items."""
        accuracy = None
        if self.right is not None and base.right is not None:
            accuracy = change_of(self.right - base.right, torch.ones_like(self.right))
        return CorpusChange(change_of(self.sums - base.sums, self.tokens), accuracy)


def change_of(differences: Tensor, weights: Tensor) -> Change:
    """Return the weighted mean of paired differences [n], with its 95 % interval over the pairs."""
    return Change(*map(float, bootstrap(differences, weights)))


def items_path(path: Path) -> Path:
    """eval.json -> eval.items.safetensors"""
    return path.with_suffix(".items.safetensors")


def save_items(path: Path, items: Mapping[str, Mapping[str, ItemLosses]]) -> None:
    """Write the items' losses, by model and corpus, beside eval.json at `path`."""
    from safetensors.torch import save_file

    tensors = {
        f"{model}.{corpus}.{key}": value
        for model, corpora in items.items()
        for corpus, losses in corpora.items()
        for key, value in vars(losses).items()
        if value is not None
    }
    with staged_file(items_path(path)) as staging:
        save_file(tensors, staging)


def load_items(path: Path, results: EvaluationResults) -> dict[str, dict[str, ItemLosses]]:
    """Read what `save_items` wrote beside eval.json at `path`, by model and corpus.

    Raises InputError for a file that is missing or malformed, and for losses that are not those of `results`.
    """
    from safetensors.torch import load_file

    file, found = items_path(path), dict[str, dict[str, ItemLosses]]()
    with as_input_error(file, AGAIN):
        tensors = load_file(regular(file))
        for model, result in results.models.items():
            for corpus, measured in result.corpora().items() if result.same_as is None else ():
                at = f"{model}.{corpus}"
                losses = ItemLosses(tensors[f"{at}.sums"], tensors[f"{at}.tokens"], tensors.get(f"{at}.right"))
                shapes = {tuple(value.shape) for value in vars(losses).values() if value is not None}
                if shapes != {(measured.items,)} or not isclose(losses.sums.sum() / losses.tokens.sum(), measured.loss, rel_tol=1e-9):
                    raise ValueError(f"{at} is not what {path} has")
                found.setdefault(model, {})[corpus] = losses
    return found

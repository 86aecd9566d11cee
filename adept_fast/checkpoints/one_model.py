"""Models loaded one at a time, each once while nobody asks for another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from adept_fast.checkpoints import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OneModel:
    """Loads models with the same options and keeps the last one, so that stages which read the same model in the same state share it.

    Memory holds one: it is let go before another is loaded. Whoever changes a model takes it.
    """

    def __init__(self, dtype: str | None = None, attn_implementation: str | None = None, trust_remote_code: bool = False) -> None:
        self.dtype, self.attn_implementation, self.trust_remote_code = dtype, attn_implementation, trust_remote_code
        self._held: tuple[Path, PreTrainedModel] | None = None

    def load(self, folder: str | os.PathLike[str]) -> PreTrainedModel:
        """The model of a folder, in eval mode. Raises InputError as load_model does."""
        path = Path(folder)
        if self._held is None or self._held[0] != path:
            self._held = None
            self._held = path, checkpoint.load_model(folder, self.dtype, self.attn_implementation, self.trust_remote_code)
        return self._held[1]

    def take(self, folder: str | os.PathLike[str]) -> PreTrainedModel:
        """The same for who is going to change it: the next one is loaded anew."""
        model, self._held = self.load(folder), None
        return model

    def renamed(self, before: Path, now: Path) -> None:
        """Tell that the folder of a model has another name."""
        if self._held is not None and self._held[0] == before:
            model = self._held[1]
            self._held = now, model
            model.name_or_path = model.config.name_or_path = str(now)

"""Load models one at a time, and reuse the last one."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from adept_fast.checkpoints import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OneModel:
    """Load models with the same options, and keep the last one for the next stage that reads the same model.

    Memory holds one model: it is released before another is loaded. A stage that changes a model calls `take`.
    """

    def __init__(self, dtype: str | None = None, attn_implementation: str | None = None, trust_remote_code: bool = False) -> None:
        self.dtype, self.attn_implementation, self.trust_remote_code = dtype, attn_implementation, trust_remote_code
        self._held: tuple[Path, PreTrainedModel] | None = None

    def load(self, folder: str | os.PathLike[str]) -> PreTrainedModel:
        """Return the model of a folder, in eval mode. Raises InputError as load_model does."""
        path = Path(folder)
        if self._held is None or self._held[0] != path:
            self._held = None
            gc.collect()  # a Trainer holds the model that it trained, and is part of a reference cycle
            self._held = path, checkpoint.load_model(folder, self.dtype, self.attn_implementation, self.trust_remote_code)
        return self._held[1]

    def take(self, folder: str | os.PathLike[str]) -> PreTrainedModel:
        """Return the model of a folder to a caller that will change it. The next call loads it again."""
        model, self._held = self.load(folder), None
        return model

    def renamed(self, before: Path, now: Path) -> None:
        """Record that the folder of the loaded model was renamed."""
        if self._held is not None and self._held[0] == before:
            model = self._held[1]
            self._held = now, model
            model.name_or_path = model.config.name_or_path = str(now)

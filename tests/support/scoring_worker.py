"""One of two processes that `torchrun` starts to score together. FOLDER [SETTING ...]: the scores of a tiny model as each process has them,
then `adept-fast score` twice, with what each process wrote into output_dir, and at last with a second process that fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from adept_fast import mask_units
from adept_fast.cli.main import main
from adept_fast.errors import InputError
from adept_fast.runtime import distributed
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.race import Race
from adept_fast.scoring.score_layers import score_layers
from tests.support import tiny_models

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Written:
    """Names that this process opens to write, renames to or removes in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = str(folder), set()
        sys.addaudithook(self.hear)

    def hear(self, event: str, given: tuple) -> None:
        if (event == "open" and given[2] & WRITING) or event in ("os.rename", "os.remove"):
            path = os.fspath(given[1] if event == "os.rename" else given[0])
            if isinstance(path, str) and path.startswith(self.folder):
                self.names.add(os.path.relpath(path, self.folder))

    def take(self) -> list[str]:
        """So far; all processes wait for each other, so that none has begun what comes next."""
        distributed.barrier()
        names, self.names = sorted(self.names), set()
        distributed.barrier()
        return names


def failing(*_: object) -> None:
    raise RuntimeError("out of\nmemory")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join()
    folder, settings, rank = Path(sys.argv[1]), sys.argv[2:], distributed.rank()
    model, items = tiny_models.model(num_hidden_layers=6), tiny_models.items(40)
    found = {
        "whole": score_layers(model, items, losses=("kl",), journal=folder / "journal"),
        "raced": score_layers(model, items, race=Race(k=2, regret=0.3, first=8)),
        "fisher": score_layers(model, items, "fisher"),
        "units": mask_units(model, items, "head", layers=[1, 4], journal=folder / "units"),
    }
    with pytest.raises(InputError, match="^items, plan of what is scored: not the same in all processes"):
        score_layers(model, items[rank:], sweep_tokens=256 + rank)
    for name, scores in found.items():
        scores.save(folder / f"{name}-{rank}.json")
    written = Written(folder / "two")
    done = []
    for _ in range(2):
        done.append({"code": main(["score", *settings, f"output_dir={folder / 'two'}"]), "written": written.take()})
    (folder / f"done-{rank}.json").write_text(json.dumps(done))
    distributed.barrier()
    with patch.object(LayerMasks, "measure", failing if rank else LayerMasks.measure):
        sys.exit(main(["score", *settings, f"output_dir={folder / 'failed'}"]))

"""One of two processes that score a tiny model together: `torchrun`-like environment, results of rank 0 to a file."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny_models
import torch

from adept_fast import distributed
from adept_fast.importance import Race, score_layers

if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join()
    folder = Path(sys.argv[1])
    model, items = tiny_models.model(num_hidden_layers=6), tiny_models.items(40)
    whole = score_layers(model, items, losses=("kl",), quiet=True, journal=folder / "journal")
    raced = score_layers(model, items, race=Race(k=2, regret=0.3, first=8), quiet=True)
    fisher = score_layers(model, items, "fisher", quiet=True)
    for name, scores in (("whole", whole), ("raced", raced), ("fisher", fisher)):
        scores.save(folder / f"{name}-{distributed.rank()}.json")
    distributed.wait()
    torch.distributed.destroy_process_group()

"""Adapt a model to a text by copied layers, by LoRA and in full, and compare: python examples/adapt_and_compare.py [MODEL TEXT [STEPS]]

MODEL: a folder or hub name, TEXT: a file or folder; default: a tiny model and this project's licence. Each method gets the same text,
steps and held-out items, and a learning rate that suits it. compared/compare.html shows what each learnt and what it lost. Needs the
extra [lora].
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_model import short_text, tiny_model

from adept_fast.cli.main import main

target = Path("compared")
target.mkdir(exist_ok=True)
given = len(sys.argv) > 2
model, text = sys.argv[1:3] if given else (tiny_model(target / "model"), short_text(target))
steps = sys.argv[3] if len(sys.argv) > 3 else "8"

RATES = {"adept": 2e-3, "lora": 2e-3, "full": 3e-4}  # copies and adapters start at nothing, and take more than a full training
for method, rate in RATES.items():
    settings = {
        "model_name_or_path": model,
        "domain": text,
        "output_dir": target / method,
        "method": method,
        "score.max_items": 24,
        "expand.k": 2,
        "tune.learning_rate": rate,
        "tune.max_steps": steps,
        "tune.block_size": 128,
        "tune.refresh_steps": 4,
        "tune.max_items": 4,
        "eval.max_items": 8,
    }
    if method != "adept":
        del settings["score.max_items"], settings["expand.k"]  # no layers are copied
    if code := main(["run", *(f"{key}={value}" for key, value in settings.items())]):
        raise SystemExit(code)
raise SystemExit(main(["compare", *(str(target / method) for method in RATES), f"output_dir={target}"]))

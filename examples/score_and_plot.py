"""Which layers does a model rest on? A table and a picture: python examples/score_and_plot.py [MODEL [PROBE]]

MODEL: a folder or hub name; default: a tiny model that is made first. PROBE: a file of questions with answers, or texts; default: the
general probe of the package. Writes layers.csv, layers.png and scores.json to scored/.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_model import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adept_fast import score_layers, select_layers
from adept_fast.data.items import load_items

target = Path("scored")
target.mkdir(exist_ok=True)
name = sys.argv[1] if len(sys.argv) > 1 else tiny_model(target / "model")
probe = sys.argv[2] if len(sys.argv) > 2 else "general"

model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
items = load_items(probe, tokenizer)[:64]
scores = score_layers(model, items)  # by how much the loss of the answers rises without each layer, with intervals over the items
chosen = select_layers(scores, k=2)  # the layers that matter least
scores.save(target / "scores.json")

table = scores.to_dataframe()
table["chosen"] = table.index.isin(chosen)
table.to_csv(target / "layers.csv")
print(table.round(3))

axes = scores.plot(chosen)
axes.set_title(f"Rise of the loss without a layer, nats a token: {scores.items} items")
axes.figure.savefig(target / "layers.png", dpi=150)
print(f"{target / 'layers.csv'}, {target / 'layers.png'}: copy layers {chosen}")

"""ADEPT in a training loop of your own: python examples/plain_loop.py MODEL TEXT_FILE [STEPS]

Copies of two layers are trained on a text file, each unit at a rate of its own from the bundled general probe, refreshed every 10 steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adept_fast import AdamW, Units, apply_rates, expand_model, fast_step, freeze_original, score_units, unit_rates
from adept_fast.data.items import load_items
from adept_fast.expansion.first_importance import first_importance
from adept_fast.scoring.unit_importance import unit_importance

name, text, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 30
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained(name)
count = base.config.num_hidden_layers
layers = [count // 3, count - 1]
model = expand_model(base, layers)  # better: select_layers(score_layers(base, "general", tokenizer=tokenizer), k=2)
freeze_original(model)

units = Units.of(model, "tensor")
probe = load_items("general", tokenizer)[:8]
optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3, weight_decay=0.1)
first = unit_importance(units, first_importance(model, probe))  # of the copied layers: a silent copy has no gradient to measure yet
apply_rates(optimizer, model, units, unit_rates(first))

tokens = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
blocks = tokens[: len(tokens) // 64 * 64].view(-1, 64)
model.train()
with fast_step(model):  # the loss without logits
    for step in range(1, steps + 1):
        batch = blocks[torch.randint(len(blocks), (4,))]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and step < steps:
            apply_rates(optimizer, model, units, unit_rates(score_units(model, probe, units)))
        print(f"step {step}: loss {float(loss):.3f}", flush=True)

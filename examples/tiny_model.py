"""The examples' defaults: a model of 1.4 MB, trained for seconds on the bundled general probe, and a short text of another domain."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adept_fast

ROOT = Path(__file__).parents[1]
PROBE = Path(adept_fast.__file__).parent / "data" / "general_probe.jsonl"


def tiny_model(folder: Path, layers: int = 6, steps: int = 40) -> Path:
    """Train the model and write it to `folder`."""
    rows = map(json.loads, PROBE.read_text(encoding="utf-8").splitlines())
    texts = [row["instruction"] + row["output"] for row in rows]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=512)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1, **shape))
    optimizer = adept_fast.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor(tokenizer("</s>".join(texts)).input_ids)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 65, (16, 1))
        batch = ids[starts + torch.arange(64)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def short_text(folder: Path) -> Path:
    """Write the licence of this project as a .txt file to `folder`."""
    file = folder / "licence.txt"
    file.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    return file

"""Under flash attention documents go flattened, in one row without a mask, and stay apart: losses and gradients are those of each alone.

transformers' own code for flash attention runs, on plain torch in the place of the kernels, which need a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, default_data_collator, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from adept_fast.cli.main import main
from adept_fast.data.packing import Blocks, flattened
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.tuning.collator import collator, isolates_documents
from adept_fast.tuning.fast_step import fast_step
from tests.data.test_packing import documents
from tests.support import tiny_families, tiny_models

FLASH = "flash_in_torch"
WINDOW = {"mistral": {"sliding_window": 6}}


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, softcap: float) -> Tensor:
    """Causal, of one document: q [tokens, heads, width]; k and v with as many heads or a divisor of it."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    seen = (distance >= 0) & ((distance <= window) | (window < 0))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Puts plain torch in the kernels' place; counts calls with several documents in a row, and calls of rows that are one each."""
    counted = SimpleNamespace(documents=0, rows=0, longest=set())

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        assert causal and not dropout_p and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k and sum(lengths) == len(q)
        counted.documents += 1
        counted.longest.add(type(max_seqlen_q))
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*part, window_size[0], softmax_scale, softcap) for part in parts])

    def rows(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, **others: Any) -> Tensor:
        counted.rows += 1
        window, softcap = others.get("window_size", (-1, -1))[0], others.get("softcap", 0.0)
        return torch.stack([attention(*row, window, softmax_scale, softcap) for row in zip(q, k, v, strict=True)])

    AttentionInterface.register(FLASH, flash_attention_forward)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: (rows, varlen, None, None, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return counted


def made(family: str, attention: str) -> nn.Module:
    model = tiny_families.model(family) if family == "gemma2" else tiny_models.model(family, **WINDOW.get(family, {}))
    model.set_attn_implementation(attention)
    return model.double()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def alone(model: nn.Module, blocks: Blocks) -> tuple[Tensor, int]:
    """Summed loss and number of targets of each document by itself; its gradient is left in .grad."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for index in range(len(blocks)):
        lengths = blocks.documents(index)
        for ids in blocks[index]["input_ids"][: sum(lengths)].split(lengths):
            if len(ids) > 1:
                loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss * (len(ids) - 1)
                loss.backward()
                total, tokens = total + loss.detach(), tokens + len(ids) - 1
    return total, tokens


def without_boundaries(blocks: Any) -> dict[str, Any]:
    return flattened(blocks, boundaries=False)


@pytest.mark.parametrize("collate", [flattened, without_boundaries])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3", "gemma2"])
def test_flattened_documents_give_the_loss_and_gradient_of_each_alone(family: str, collate: Callable, calls: SimpleNamespace) -> None:
    """With boundaries given, and with those that transformers derives from position_ids alone."""
    source = documents([1, 7, 30, 13, 2, 12, 9, 20])
    source.ids[:] %= tiny_families.VOCABULARY
    blocks = Blocks(source, np.arange(len(source)), 40)
    plain, ours = made(family, "eager"), made(family, FLASH)
    loss, tokens = alone(plain, blocks)
    batch = collate([blocks[index] for index in range(len(blocks))])
    assert batch["input_ids"].shape == (1, 40 * len(blocks)) and "attention_mask" not in batch
    assert int((batch["labels"][:, 1:] != -100).sum()) == tokens
    found = ours(**batch, use_cache=False).loss * tokens
    found.backward()
    assert calls.documents and not calls.rows and calls.longest == ({int} if collate is flattened else {Tensor})
    assert abs(found.detach() - loss) <= 1e-6 * loss  # transformers takes losses in fp32
    wanted = gradients(plain)
    assert wanted.keys() == gradients(ours).keys()
    for name, gradient in gradients(ours).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


DEGENERATE: dict[str, list[list[tuple[int, str]]]] = {
    "no target": [[(12, "-")], [(5, "-"), (7, "-")]],
    "one target": [[(12, "-")], [(5, "-"), (7, "1")]],
    "one row without a target": [[(4, "x"), (8, "x")], [(12, "-")]],
    "a row of documents of one token": [[(1, "x")] * 12, [(3, "x"), (9, "1")]],
    "nothing but documents of one token": [[(1, "x")] * 12] * 2,
    "one token": [[(1, "x")]],
    "two tokens": [[(2, "x")]],
    "an empty row": [[(12, "0")], [(2, "x"), (10, "0")]],
    "all tokens alike": [[(12, "=")], [(1, "="), (11, "=")]],
}
"""Blocks, each of documents, each of so many tokens with targets on all but the first ("x", of equal tokens "="), on the last ("1"), on
none ("-"), or of padding ("0")."""


def blocks_of(case: list[list[tuple[int, str]]]) -> list[dict[str, Tensor]]:
    generator, made = torch.Generator().manual_seed(6), []
    for block in case:
        parts = []
        for length, kind in block:
            ids = torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator)
            ids = torch.full_like(ids, 7) if kind == "=" else ids * (kind != "0")
            at = torch.arange(length)
            target = {"x": at > 0, "=": at > 0, "1": at == length - 1}.get(kind, at < 0)
            parts.append((ids, torch.where(target, ids, -100), at))
        made.append(dict(zip(("input_ids", "labels", "position_ids"), map(torch.cat, zip(*parts, strict=True)), strict=True)))
    return made


def trained_copies(attention: str) -> nn.Module:
    model = expand_model(tiny_models.model(), [1, 2])
    freeze_original(model)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
    model.set_attn_implementation(attention)
    return model.train()


@pytest.mark.parametrize("collate", [flattened, without_boundaries])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_blocks_are_those_of_each_document_alone(case: str, collate: Callable, calls: SimpleNamespace) -> None:
    """By the fast step and by the model's own loss, whose 0 / 0 the trainers make 0."""
    blocks, plain = blocks_of(DEGENERATE[case]), trained_copies("eager").double()
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for block, lengths in zip(blocks, ([length for length, _ in block] for block in DEGENERATE[case]), strict=True):
        for ids, labels in zip(block["input_ids"].split(lengths), block["labels"].split(lengths), strict=True):
            logits = plain(input_ids=ids[None], use_cache=False).logits[0, :-1]
            total = total + nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
            targets += int((labels[1:] != -100).sum())
    wanted = dict.fromkeys((name for name, parameter in plain.named_parameters() if parameter.requires_grad), torch.zeros(()))
    if targets:
        (total / targets).backward()
        wanted = gradients(plain)
    for fast in (True, False):
        model = trained_copies(FLASH)
        with fast_step(model) if fast else nullcontext(True) as active:
            assert active
            loss = model(**collate(blocks), use_cache=False).loss
        loss.backward()
        assert abs(loss.detach().nan_to_num() - total.detach() / max(1, targets)) <= 1e-5 * total.detach()
        assert targets or not fast or loss == 0
        assert gradients(model).keys() == wanted.keys()
        largest = max(gradient.norm() for gradient in wanted.values())  # of equal tokens attention has a gradient of about 0
        for name, gradient in gradients(model).items():
            assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6 * largest, (name, fast)


def test_rows_of_documents_would_leak_and_the_check_says_so(calls: SimpleNamespace) -> None:
    """Why they are flattened: of several rows transformers takes each for one document, whatever position_ids say."""
    model, source = made("llama", FLASH), documents()
    blocks = Blocks(source, np.arange(len(source)), 32)
    assert not isolates_documents(model, blocks, default_data_collator)
    assert isolates_documents(model, blocks, collator(model)) and collator(model) is not default_data_collator
    assert collator(tiny_models.model()) is default_data_collator


@pytest.mark.slow
def test_a_run_under_flash_attention_is_that_of_the_masked_one(
    calls: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    tiny_models.checkpoint(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("\n\n".join(f"{text} Note {number}." for number, text in enumerate(tiny_models.SENTENCES)))
    logs = {}
    for name, attention in (("masked", "sdpa"), ("flash", FLASH)):
        settings = [f"model_name_or_path={tmp_path / 'model'}", f"domain={tmp_path / 'notes.txt'}", f"output_dir={tmp_path / name}"]
        settings += ["expand.layers=[1,2]", "tune.max_steps=4", "tune.per_device_train_batch_size=3", "tune.block_size=100"]
        settings += ["tune.gradient_accumulation_steps=2", "tune.max_items=3", "tune.refresh_steps=2", "tune.learning_rate=0.01"]
        assert main(["expand", *settings]) == main(["tune", *settings, f"attn_implementation={attention}"]) == 0
        lines = (tmp_path / name / "trainer_log.jsonl").read_text().splitlines()
        logs[name] = [entry for entry in map(json.loads, lines) if entry["event"] == "step"]
    assert calls.documents >= 4 * 2 * 6 and len(logs["flash"]) == 4 == len(logs["masked"])
    for ours, theirs in zip(logs["flash"], logs["masked"], strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= 2e-5 * theirs["loss"]
    assert logs["flash"][-1]["loss"] < logs["flash"][0]["loss"]

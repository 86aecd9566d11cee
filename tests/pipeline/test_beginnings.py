"""Whatever stage asks, and however texts are cut: each piece of text that the model sees begins as its tokenizer begins texts."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest
from torch import Tensor
from transformers import LlamaModel, Trainer

from adept_fast.cli.main import main
from adept_fast.evaluation.evaluate_model import evaluate
from adept_fast.evaluation.generation import generate
from adept_fast.evaluation.largest_alpha import largest_alpha
from adept_fast.expansion.first_importance import first_importance
from adept_fast.expansion.verify import compute_logits
from adept_fast.models.causality import require_causal
from adept_fast.models.silent_copies import describe
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.unit_importance import score_units
from adept_fast.scoring.unit_masking import UnitMasks
from adept_fast.tuning.collator import isolates_documents
from adept_fast.tuning.fast_step import fast_step
from adept_fast.tuning.forgetting_meter import Meter
from adept_fast.tuning.kl_anchor import divergence_from_base
from adept_fast.tuning.monitor import Monitor
from adept_fast.tuning.piece_losses import compare_pieces
from tests.support import tiny_models

pytestmark = pytest.mark.slow

PAD, BEGIN, BLOCK = 0, 1, 32
HEAD = 12  # characters that tell the beginning of a document from the middle of one
SENTENCES = tiny_models.SENTENCES
DOMAIN = [*(" ".join(SENTENCES[at : at + 4]) for at in range(0, 24, 4)), *SENTENCES[24:30], "A heron.", "Nine stones."]
HELD = [" ".join(SENTENCES[30:36]), *SENTENCES[36:]]  # the first longer than a block
PROBE = [
    *({"text": f"Probe {number}: {sentence}"} for number, sentence in enumerate(SENTENCES[:12])),
    *({"instruction": f"Count to {number}.", "output": sentence} for number, sentence in enumerate(SENTENCES[12:25])),
]

# Each proves something of the model on token ids that it makes up (fast_step before it yields): no text, and nothing to begin.
PROOFS = (require_causal, describe, compute_logits, fast_step)
# Who has the model read text: each must be seen to, or the test has not looked there.
READERS = {
    "score": (LayerMasks.measure, UnitMasks.measure),
    "expand": (first_importance,),
    "tune": (
        isolates_documents,
        compare_pieces,
        score_units,
        Meter.read,
        Monitor._monitor,
        divergence_from_base,
        Trainer.training_step,
    ),
    "eval": (evaluate, generate, largest_alpha),
}
PACKING = (LayerMasks.measure, UnitMasks.measure, isolates_documents, Trainer.training_step)  # several texts in a row
KINDS = ("Probe ", "Count to ", "The ")  # texts and instructions of the probe, documents of the domain
SPLITTING = (compare_pieces, Trainer.training_step)  # a document goes on in another piece


def code(function: Callable) -> CodeType:
    return inspect.unwrap(function).__code__


def callers() -> Iterator[CodeType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def pieces(row: list[int], positions: list[int]) -> list[list[int]]:
    """The texts of a row, parted where positions start again, without what only pads it."""
    starts = [at for at, position in enumerate(positions) if at == 0 or position == 0]
    parted = [row[start:stop] for start, stop in zip(starts, [*starts[1:], len(row)], strict=True)]
    return [piece for piece in parted if any(token != PAD for token in piece)]


@dataclass(frozen=True)
class Call:
    """One of the model's: who is behind it, and the pieces of each row (no row of a proof)."""

    behind: frozenset[CodeType]
    rows: list[list[list[int]]]

    def of(self, function: Callable) -> bool:
        return code(function) in self.behind


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    seen: list[Call] = []
    own, proofs = LlamaModel.forward, {code(proof) for proof in PROOFS}

    @functools.wraps(own)
    def forward(self: LlamaModel, *, input_ids: Tensor, position_ids: Tensor | None = None, **more: object) -> object:
        behind = frozenset(callers())
        ids = [] if behind & proofs else input_ids.tolist()
        positions = [list(range(len(row))) for row in ids]
        if ids and position_ids is not None:
            positions = position_ids.expand_as(input_ids).tolist()
        seen.append(Call(behind, [pieces(row, each) for row, each in zip(ids, positions, strict=True)]))
        return own(self, input_ids=input_ids, position_ids=position_ids, **more)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    return seen


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_models.checkpoint(tmp_path / "model", begins=True, num_hidden_layers=2)
    Path("domain.txt").write_text("\n\n".join(DOMAIN))
    Path("held.txt").write_text("\n\n".join(HELD))
    Path("probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBE))
    return tmp_path


def require_beginnings(stage: str, calls: list[Call]) -> None:
    """All pieces begin with BOS, once; and all readers of the stage were seen to read, packed and split texts where they do."""
    tokenizer, heads = tiny_models.tokenizer(begins=True), {text[:HEAD] for text in (*DOMAIN, *HELD)}
    for call in calls:
        for row in call.rows:
            for piece in row:
                who = sorted(function.co_qualname for function in call.behind if "adept_fast" in function.co_filename)
                assert piece[0] == BEGIN and BEGIN not in piece[1:], (stage, who, tokenizer.decode(piece))
    texts = [tokenizer.decode(piece, skip_special_tokens=True) for call in calls for row in call.rows for piece in row]
    assert stage == "expand" or all(any(text.startswith(kind) for text in texts) for kind in KINDS), stage
    for reader in READERS[stage]:
        rows = [row for call in calls if call.of(reader) for row in call.rows]
        assert rows, (stage, reader)
        if reader in PACKING:
            assert max(map(len, rows)) > 1, (stage, reader)
        if reader in SPLITTING:
            texts = [tokenizer.decode(piece, skip_special_tokens=True) for row in rows for piece in row]
            assert any(text[:HEAD] not in heads for text in texts if len(text) >= HEAD), (stage, reader)


def test_all_text_that_the_model_sees_begins_with_bos(here: Path, calls: list[Call]) -> None:
    given = ["model_name_or_path=model", "probe=probe.jsonl", "domain=domain.txt", "dtype=float32", "expand.layers=[1]"]
    scoring = ["score.domain_items=4", "score.units=tensor", "score.unit_layers=[1]"]
    tuning = ["eval.domain=held.txt", f"tune.block_size={BLOCK}", "tune.max_steps=4", "tune.refresh_steps=2"]
    tuning += ["tune.per_device_train_batch_size=2", "tune.anchor_weight=0.5", "tune.anchor_every=1", "tune.general_limit=5"]
    proven = set()
    for stage, more in (
        ("score", ["output_dir=out", *scoring]),
        ("expand", ["output_dir=out"]),
        ("tune", ["output_dir=out", *tuning]),
        ("eval", ["output_dir=out", *tuning, "eval.general_limit=0.01", "eval.answer_tokens=1"]),
        ("expand", ["output_dir=streamed"]),
        ("tune", ["output_dir=streamed", *tuning, "tune.streaming=true"]),
    ):
        calls.clear()
        assert main([stage, *given, *more, "--debug"]) == 0
        require_beginnings(stage, calls)
        proven |= {proof for proof in PROOFS if any(call.of(proof) for call in calls)}
    assert proven == set(PROOFS)  # no more is left out than there is

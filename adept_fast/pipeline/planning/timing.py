"""Time short pieces of the real work on this machine: a forward, a scoring pack, an importance, a training step, a write to disk.

Each does the work of a stage by the code of that stage, on as much of it as fits a few seconds, so that the rest follows in proportion.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from adept_fast.data.items import Item
from adept_fast.evaluation.generation import generate
from adept_fast.models.decoder_layers import device_of
from adept_fast.models.losses import BATCH_TOKENS, batch_loss, corpus_loss, padded_tokens
from adept_fast.runtime.malloc import freed_memory_kept
from adept_fast.runtime.memory import forget_peak, peak
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.packs import Pack
from adept_fast.scoring.select_layers import evenly
from adept_fast.tuning.collator import collator
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.tuning_settings import TuningSettings, arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WARMING = 32  # tokens of the first forward, which loads weights and starts threads
DECODED = 4  # tokens
WRITTEN = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Timed:
    """A measurement. seconds; work: what was done in them (tokens, FLOP, items, bytes). peak: bytes held at most meanwhile."""

    seconds: float
    work: float
    peak: int

    def of(self, work: float) -> float:
        """Return the seconds of so much work."""
        return self.seconds * work / self.work


def timed(call: Callable[[], object], work: float, device: torch.device) -> Timed:
    """Time a call."""
    forget_peak(device)
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return Timed(time.perf_counter() - start, work, peak(device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_forward(model: PreTrainedModel, items: Sequence[Item], seconds: float) -> Timed:
    """Time the losses of items, the longest first, as evaluation takes them. work: padded tokens."""
    device, longest = device_of(model), sorted(items, key=lambda item: -len(item.input_ids))

    def run(most: int) -> Timed:
        chosen: list[Item] = []
        for item in longest:
            cut = Item(item.input_ids[:most], item.labels[:most])
            if chosen and padded_tokens([*chosen, cut]) > most:
                break
            chosen.append(cut)
        return timed(lambda: corpus_loss(model, chosen, title="timing a forward"), padded_tokens(chosen), device)

    warm = run(WARMING)
    return run(max(WARMING, min(BATCH_TOKENS, int(seconds / warm.of(1)))))


def time_masking(masks: LayerMasks, packs: Sequence[Pack], losses: Collection[str], seconds: float) -> Timed:
    """Time the costliest pack without each of as many layers as `seconds` allow. work: FLOPs."""
    largest, device = max(packs, key=lambda pack: masks.flops(pack, range(masks.count))), device_of(masks.model)

    def run(layers: Sequence[int]) -> Timed:
        return timed(lambda: masks.measure(largest, layers, losses), masks.flops(largest, layers), device)

    with freed_memory_kept():
        warm = run(())
        choices = [evenly(range(masks.count), count) for count in range(masks.count, 0, -1)]
        affordable = next((layers for layers in choices if warm.of(masks.flops(largest, layers)) <= seconds), choices[-1])
        return run(affordable)


def typical(items: Sequence[Item]) -> Item:
    """Return the item whose length is nearest the mean."""
    mean = sum(len(item.input_ids) for item in items) / len(items)
    return min(items, key=lambda item: abs(len(item.input_ids) - mean))


def time_importance(model: PreTrainedModel, items: Sequence[Item]) -> Timed:
    """Time forward and backward of the item of mean length, to the parameters that require a gradient. work: items."""
    item = typical(items)

    def run() -> None:
        batch_loss(model, [item]).backward()
        model.zero_grad()

    run()
    return timed(run, 1, device_of(model))


def time_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Return the seconds of answers of so many tokens to the prompts, from one of a token and one of DECODED more."""
    if not prompts:
        return 0.0

    def run(count: int) -> float:
        return timed(lambda: generate(model, tokenizer, prompts, count, title="timing answers"), 1, device_of(model)).seconds

    run(1)
    first = run(1)
    return first + (tokens - 1) * max(0.0, run(1 + DECODED) - first) / DECODED


@dataclass(frozen=True)
class TimedSteps(Timed):
    """Training steps. work: tokens of a step. kept: bytes that the forward of one token keeps for backward."""

    kept: float = 0.0


def time_steps(model: Any, settings: TuningSettings, blocks: Sequence[dict[str, Tensor]], rows: int, tokens: int) -> TimedSteps:
    """Time the second of two training steps by the Trainer, on `rows` rows of the first `tokens` tokens of blocks.

    model: prepared for training. It is changed. The first step makes the optimizer's states.
    """
    given = {"max_steps": 2, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "logging_strategy": "no"}
    given |= {"save_strategy": "no", "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0, "report_to": "none"}
    data = [{key: value[:tokens] for key, value in blocks[index % len(blocks)].items()} for index in range(2 * rows)]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(replace(settings, training={**settings.training, **given}), Path(folder))
        trainer = _Measured(model, args, train_dataset=data, data_collator=collator(model), callbacks=[clock])
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        forget_peak(args.device)
        trainer.train()
        return TimedSteps(clock.seconds, rows * tokens, peak(args.device), trainer.kept / (rows * tokens))


class _Measured(StagedTrainer):
    """A Trainer that counts the bytes which the last forward keeps for backward, parameters left out."""

    kept = 0

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = super().compute_loss(model, *args, **kwargs)
        self.kept = sum(held.values())
        return loss


class _Clock(TrainerCallback):
    """Measures the last step."""

    seconds = start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait(args.device)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait(args.device)
        self.seconds = time.perf_counter() - self.start


def time_writing(folder: Path) -> Timed:
    """Time a write to the disk of `folder`, or of the folder above it that exists. work: bytes. No file is left there."""
    while not folder.is_dir():
        folder = folder.parent
    content = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return _written(file, content)
    except OSError:  # a folder that cannot be written to; a run will say so
        with tempfile.TemporaryFile() as file:
            return _written(file, content)


def _written(file: Any, content: bytes) -> Timed:
    def write() -> None:
        for _ in range(WRITTEN // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())

    return timed(write, WRITTEN, torch.device("cpu"))

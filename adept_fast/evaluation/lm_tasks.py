"""Tasks of lm-eval: run on base and tuned model, and compared item by item."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from adept_fast.errors import InputError
from adept_fast.evaluation.paired_items import change_of
from adept_fast.evaluation.results import Change, Task, TaskMetric
from adept_fast.models.decoder_layers import device_of
from adept_fast.runtime.bootstrap import TAILS
from adept_fast.runtime.optional_packages import optional
from adept_fast.settings.validation import require_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = {"cpu": 1, "cuda": 16}
RESAMPLES = 200  # where a metric is no mean over items, and lm-eval's own function computes it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LmTasks:
    """Tasks that lm-eval has loaded, with their data.

    names: of tasks and groups. limit: items of each task, the first ones. digest: of what is asked
    """

    names: tuple[str, ...]
    limit: int | None
    manager: Any
    tasks: Mapping[str, Any]
    digest: str

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the results of lm-eval for a model, with those of each item."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with torch.random.fork_rng():
            own = deepcopy(tokenizer)  # lm-eval sets its padding token
            wrapped = HFLM(pretrained=model, tokenizer=own, batch_size=BATCH.get(device_of(model).type, 1))
            found: dict[str, Any] = simple_evaluate(
                wrapped, tasks=list(self.names), task_manager=self.manager, limit=self.limit, bootstrap_iters=0, log_samples=True
            )
        return found

    def compared(self, base: Mapping[str, Any], tuned: Mapping[str, Any] | None) -> dict[str, Task]:
        """Compare the results of two models; `tuned` may be missing. Groups have no intervals: their tasks have."""
        found = {}
        for name, values in base["results"].items():
            metrics = {}
            for key, before in values.items():
                metric, _, filtered = key.partition(",")
                after = None if tuned is None else tuned["results"][name].get(key)
                if not filtered or metric.endswith("_stderr") or not _finite(before) or (tuned is not None and not _finite(after)):
                    continue
                change = None if tuned is None or after is None else self._change(name, metric, filtered, base, tuned, before, after)
                better = base.get("higher_is_better", {}).get(name, {}).get(metric)
                metrics[metric if filtered == "none" else key] = TaskMetric(float(before), after, change, better is not False)
            items = base["n-samples"].get(name, {}).get("effective") or values.get("sample_len")
            found[name] = Task(int(items or 0), metrics)
        return found

    def _change(
        self, name: str, metric: str, filtered: str, base: Mapping[str, Any], tuned: Mapping[str, Any], before: float, after: float
    ) -> Change | None:
        if name not in self.tasks:
            return None
        pairs = []
        for one, other in zip(base["samples"][name], tuned["samples"][name], strict=True):
            if [one[key] for key in ("doc_id", "doc_hash", "filter")] != [other[key] for key in ("doc_id", "doc_hash", "filter")]:
                raise InputError(f"eval.tasks: {name} asked base and tuned model different items: run adept-fast eval again")
            if one["filter"] == filtered and metric in one:
                pairs.append((one[metric], other[metric]))
        if not pairs:
            return None
        if all(_finite(value) for pair in pairs for value in pair):
            scores = torch.tensor(pairs, dtype=torch.float64)
            if torch.allclose(scores.mean(0), torch.tensor([before, after], dtype=torch.float64), rtol=1e-9, atol=1e-12):
                return change_of(scores[:, 1] - scores[:, 0], torch.ones(len(scores)))
        aggregate = self.tasks[name].aggregation().get(metric)
        return None if aggregate is None else _resampled(aggregate, pairs, after - before)


def load_tasks(names: Sequence[str], limit: int | None, include_path: str | None) -> LmTasks:
    """Let lm-eval find tasks and load their data.

    include_path: folder with YAML files of further tasks. Raises InputError without lm-eval, and for a task that is unknown, that runs
    code of its answers, or whose data cannot be had.
    """
    optional("lm_eval", "eval", "eval.tasks")
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else require_path("tasks_include_path", include_path)
    if folder is not None and not folder.is_dir():
        raise InputError(f"tasks_include_path must be a folder with YAML files of tasks, found {folder}", "tasks_include_path")
    manager = TaskManager(include_path=folder, include_defaults=False)
    if {*names} - {*manager.all_tasks}:
        manager = TaskManager(include_path=folder)  # with thousands of its own
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise InputError(f"tasks: lm-eval has no task {name}: {hint}", "tasks")
    try:
        tasks = manager.load(list(names))["tasks"]
        asked = {name: [task.dump_config(), _documents(task, limit)] for name, task in sorted(tasks.items())}
    except Exception as error:  # of datasets, huggingface_hub, YAML and the tasks' own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        given = ", ".join(names)
        raise InputError(f"tasks: lm-eval cannot load {given} ({reason}): its data must be at hand or on a hub", "tasks") from error
    if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise InputError(f"tasks: {unsafe[0]} runs code that the model writes: leave it out, or run lm_eval on the checkpoint", "tasks")
    content = json.dumps([metadata.version("lm_eval"), limit, asked], sort_keys=True, default=_name)
    return LmTasks(tuple(names), limit, manager, tasks, hashlib.sha256(content.encode()).hexdigest())


def _documents(task: Any, limit: int | None) -> list[Any]:
    return [document for _, document in task.doc_iterator(rank=0, limit=limit, world_size=1)]


def _name(value: Any) -> str:
    """Describe what JSON has no form for, without addresses in memory."""
    return str(getattr(value, "__qualname__", type(value).__name__))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _resampled(aggregate: Callable[[list[Any]], float], pairs: Sequence[tuple[Any, Any]], value: float) -> Change:
    """Return the change of a metric that is no mean, by a bootstrap over pairs of items."""
    draws = torch.randint(len(pairs), (RESAMPLES, len(pairs)), generator=torch.Generator().manual_seed(0)).tolist()
    changes = [aggregate([pairs[at][1] for at in draw]) - aggregate([pairs[at][0] for at in draw]) for draw in draws]
    low, high = torch.quantile(torch.tensor(changes, dtype=torch.float64), TAILS).tolist()
    return Change(value, low, high)

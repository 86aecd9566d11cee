"""Collects the updates of a step, column by column.

Looking up an update (update_lookup.py) takes about 20 us of Python. An update that was looked up once is reused while nothing that it
depends on has changed. That is compared for all parameters at once, one property at a time, without a call of Python code per parameter.
Tensors are read from the parameter, its gradient and its state at every step, hyperparameters from the group.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, repeat
from operator import attrgetter, call, eq, is_, is_not
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from adept_fast.ops import dispatch
from adept_fast.ops.adamw.checks import CODES, SCALES
from adept_fast.ops.adamw.memory_order import Operands, Pair, in_memory
from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.ops.adamw.table import Table
from adept_fast.optim.arguments import check_hyperparameters, check_keys, check_own_arguments, refuse_sparse
from adept_fast.optim.state import MASTER_KEYS, RATES, STALE_AFTER_EDIT, Settings
from adept_fast.optim.update_lookup import Group, States, operands_of, options_of
from adept_fast.runtime import dtensor

Place = tuple[torch.device, str]  # device, backend
Reference = Callable[[], Tensor | None]  # weak, so that no state tensor is kept alive; of an optional tensor that is absent: type(None)
_dtypes, _strides, _versions = (partial(map, get) for get in (attrgetter("dtype"), Tensor.stride, attrgetter("_version")))


class Known(NamedTuple):
    """What is the same in every step of one parameter, and what that relies on.

    references, keys: of exp_avg, exp_avg_sq, max_exp_avg_sq, master, exp_avg_scale, exp_avg_sq_scale, step in the state; None: it has none.
    """

    references: tuple[Reference, ...]
    keys: tuple[str | None, ...]
    param_dtype: torch.dtype
    param_stride: tuple[int, ...]
    grad_dtype: torch.dtype
    grad_stride: tuple[int, ...]
    rates: tuple[Tensor, int] | None
    multipliers: Tensor | None
    length: int
    inner: int
    first_index: int
    seed: int
    row: int
    place: Place


@dataclass
class StepUpdates:
    """All updates of a step.

    batches: those on one device by one backend: a table, or a list of Update that torch.compile can trace.
    copies: (tensor, copy): copies to write back after the step.
    grads, meshes: each gradient and the mesh that it is sharded over.
    """

    batches: dict[Place, Any] = field(default_factory=dict)
    copies: list[Pair] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    meshes: list[dtensor.Mesh | None] = field(default_factory=list)

    def add(self, operands: Sequence[Operands], options: AdamWOptions) -> None:
        for given in operands:
            update, copies = in_memory(given, options)
            place = (update.param.device, given.backend)
            if place not in self.batches:
                self.batches[place] = []
            self.batches[place].append(update)
            self.copies.extend(copies)
            self.grads.append(update.grad)
            self.meshes.append(given.mesh)


class UpdateCollector:
    """Collects the updates of each step.

    known: by the number of the parameter in all groups; None: to be looked up.
    words: of each known update, Table.fingerprint's part from the step that was checked; empty before it.
    written: version counter of each parameter with a master after its last step, by id; `edited` keeps these parameters, so that no id is
        reused. Others are not referred to, even weakly: torch then refuses to swap their contents, as Module.to does.
    """

    def __init__(self) -> None:
        self.known: list[Known | None] = []
        self.words: list[bytes] = []
        self.written: dict[int, int] = {}
        self.relied_on: list[tuple[Any, ...]] = []
        self.edited: dict[int, Tensor] = {}
        self.params: list[int] = []  # ids
        self.with_states: list[int] = []  # ids of the keys of the states, in their order
        self.state_of: list[int | None] = []  # place of each parameter's state in that order

    def collect(self, settings: Settings, groups: Sequence[Group], states: States) -> StepUpdates:
        """Collect the updates of this step, with a table for each device and backend.

        A second pass looks up the tensors whose memory changed although the Python object is the known one.
        """
        try:
            step, tables = self._pass(settings, groups, states)
        except KeyError:
            for number, group in enumerate(groups):
                check_keys(number, group)
            raise
        outdated = [i for table, numbers in tables for i in self._outdated(table, numbers)]
        if outdated:
            for i in outdated:
                self.known[i], self.words[i] = None, b""
            step, _ = self._pass(settings, groups, states)
        return step

    def _pass(self, settings: Settings, groups: Sequence[Group], states: States) -> tuple[StepUpdates, list[tuple[Table, list[int]]]]:
        """Return the updates, and each table with the numbers of its parameters."""
        params, options, rates = self._flattened(settings, groups)
        grads = [param.grad for param in params]
        chosen = [i for i, grad in enumerate(grads) if grad is not None]
        if {*map(attrgetter("layout"), [grads[i] for i in chosen])} - {torch.strided}:
            refuse_sparse(params)
        values = self._ordered(states)
        ready = [i for i in chosen if self.known[i] is not None and self.state_of[i] is not None]
        rows, places = self._reused(ready, params, grads, values, rates, options)
        self.reset_edited(_at(params, ready), states, settings.master_weights)
        step, meshes = StepUpdates(), {}
        if len(rows) < len(chosen):
            firsts = [0, *accumulate(len(group["params"]) for group in groups)]
            for i in chosen:
                if i not in rows:
                    number = bisect_right(firsts, i) - 1
                    given = operands_of(settings, number, groups[number], i - firsts[number], firsts[number], states)
                    self.reset_edited([params[i]], states, settings.master_weights)
                    rows[i], copies = in_memory(given, options[i])
                    places[i], meshes[i] = (given.param.device, given.backend), given.mesh
                    known_rates = groups[number].get(RATES, {}).get(i - firsts[number])
                    self.known[i], self.words[i] = known_of(params[i], given, rows[i], known_rates), b""
                    step.copies += copies
        tables: list[tuple[Table, list[int]]] = []
        for place in {places[i]: None for i in chosen}:
            numbers = [i for i in chosen if places[i] == place]
            tables.append((Table([rows[i] for i in numbers]), numbers))
            step.batches[place] = tables[-1][0]
        if settings.max_grad_norm is not None:
            step.grads, step.meshes = [rows[i][1] for i in chosen], [meshes[i] if i in meshes else None for i in chosen]
        return step, tables

    def _flattened(self, settings: Settings, groups: Sequence[Group]) -> tuple[list[Tensor], list[AdamWOptions], list[Any]]:
        """Return parameters, options and rates of all groups. Forgets what is known if it relied on other ones."""
        params: list[Tensor] = []
        options: list[AdamWOptions] = []
        rates: list[Any] = []
        relied_on, forced = [], os.environ.get(dispatch.OVERRIDE)
        for number, group in enumerate(groups):
            check_hyperparameters(number, group)
            there = group["params"]
            relied_on.append((settings, forced, group["amsgrad"], len(params)))
            options += [options_of(group, settings)] * len(there)
            rates += map(group[RATES].get, range(len(there))) if group.get(RATES) else [None] * len(there)
            params += there
        ids = list(map(id, params))
        if ids != self.params or relied_on != self.relied_on:
            check_own_arguments(settings.state_dtype, settings.master_weights, settings.max_grad_norm)
            self.relied_on, self.known, self.words = relied_on, [None] * len(params), [b""] * len(params)
            self.with_states, self.state_of = [], [None] * len(params)
            for key in self.edited.keys() - ids:
                del self.edited[key], self.written[key]
            self.params = ids
        return params, options, rates

    def _ordered(self, states: States) -> list[dict[str, Any]]:
        """Return the states in their order, and bring `state_of` up to date."""
        ids = list(map(id, states))
        if ids != self.with_states:
            places = {key: place for place, key in enumerate(ids)}
            self.with_states, self.state_of = ids, [places.get(key) for key in self.params]
        return list(states.values())

    def _reused(
        self, ready: list[int], params: list[Tensor], grads: list[Tensor | None], values: list[dict[str, Any]], rates: list[Any],
        options: list[AdamWOptions],
    ) -> tuple[dict[int, Any], dict[int, Place]]:  # fmt: skip
        """Return the updates of known parameters that are as they were, and their places, by number."""
        if not ready:
            return {}, {}
        then: Any = Known._make(zip(*_at(self.known, ready), strict=True))
        params, grads, held = _at(params, ready), _at(grads, ready), _at(values, _at(self.state_of, ready))
        lookups = list(map(attrgetter("get"), held))
        # A key that is gone gives itself, which is not the dead reference's None.
        tensors = [list(map(call, lookups, keys, keys)) for keys in zip(*then.keys, strict=True)]
        exp_avg, exp_avg_sq, largest, master, scale, scale_sq, steps = tensors
        compared: list[tuple[Callable[[Any, Any], bool], Iterable[Any], Iterable[Any]]] = [
            *((is_, now, map(call, column)) for now, column in zip(tensors, zip(*then.references, strict=True), strict=True)),
            *((is_not, now, repeat(None)) for now in (exp_avg, exp_avg_sq, steps)),  # a dead reference is None, too
            (is_, _at(rates, ready), then.rates),
            (is_, _dtypes(params), then.param_dtype),
            (is_, _dtypes(grads), then.grad_dtype),
            (eq, _strides(params), then.param_stride),
            (eq, _strides(grads), then.grad_stride),
        ]
        kept = map(all, zip(*(map(same, now, before) for same, now, before in compared), strict=True))
        rows = zip(
            params, grads, exp_avg, exp_avg_sq, largest, master, steps, then.multipliers, then.length, then.inner, then.first_index,
            then.seed, _at(options, ready), scale, scale_sq, then.row, strict=True,
        )  # fmt: skip
        found = [(i, row, place) for i, row, place, same in zip(ready, rows, then.place, kept, strict=True) if same]
        return {i: row for i, row, _ in found}, {i: place for i, _, place in found}

    def reset_edited(self, params: list[Tensor], states: States, mode: str | None) -> None:
        """Zero the remainder or compensation of parameters that were edited since their last step.

        Raises RuntimeError during the capture of a CUDA graph, every replay of which would zero it again.
        """
        key = MASTER_KEYS.get(mode or "")
        if key not in STALE_AFTER_EDIT:
            return
        now = list(_versions(params))
        if list(map(self.written.get, map(id, params), now)) == now:
            return
        for param, version in zip(params, now, strict=True):
            if self.written.get(id(param), version) != version and key in states[param]:
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError("a parameter was edited in place since the last step: run a step before the capture of a CUDA graph")
                states[param][key].zero_()

    def note_versions(self, groups: Sequence[Group]) -> None:
        """Store the version counters of the updated parameters."""
        params = [param for group in groups for param in group["params"] if param.grad is not None]
        self.edited.update(zip(map(id, params), params, strict=True))
        self.written.update(zip(map(id, params), _versions(params), strict=True))

    def _outdated(self, table: Table, numbers: list[int]) -> list[int]:
        """Return the numbers of known updates whose tensors are not the checked ones. Stores the words of new ones."""
        words, found = table.fingerprint(), table.misfits()
        known = _at(self.words, numbers)
        if known != words:
            for place, (i, before, now) in enumerate(zip(numbers, known, words, strict=True)):
                if not before:
                    self.words[i] = now
                elif before != now:
                    found.add(place)
        return [numbers[place] for place in sorted(found) if self.known[numbers[place]] is not None]


def known_of(param: Tensor, given: Operands, update: Update, rates: tuple[Tensor, int] | None) -> Known | None:
    """Keep what `in_memory` made of `given`.

    Returns None for shards, reordered copies and complex parameters, which are looked up at every step.
    """
    own = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step")
    if param is not given.param or any(getattr(update, name) is not getattr(given, name) for name in own):
        return None
    if rates is not None and (update.multipliers is None or update.multipliers.data_ptr() != rates[0].data_ptr()):
        return None
    eight_bit, mode = update.row > 0, update.options.master_weights
    maximum = None if update.max_exp_avg_sq is None else "max_exp_avg_sq"
    master = None if update.master is None or mode is None else MASTER_KEYS[mode]
    codes, scales = CODES if eight_bit else ("exp_avg", "exp_avg_sq"), SCALES if eight_bit else (None, None)
    moments, scale = (update.exp_avg, update.exp_avg_sq, update.max_exp_avg_sq), (update.exp_avg_scale, update.exp_avg_sq_scale)
    return Known(
        references=tuple(type(None) if tensor is None else ref(tensor) for tensor in (*moments, update.master, *scale, update.step)),
        keys=(*codes, maximum, master, *scales, "step"),
        param_dtype=param.dtype,
        param_stride=param.stride(),
        grad_dtype=given.grad.dtype,
        grad_stride=given.grad.stride(),
        rates=rates,
        multipliers=update.multipliers,
        length=update.length,
        inner=update.inner,
        first_index=update.first_index,
        seed=update.seed,
        row=update.row,
        place=(param.device, given.backend),
    )


def _at(column: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [column[place] for place in places]

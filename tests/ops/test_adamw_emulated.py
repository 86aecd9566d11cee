"""The CUDA launches on the emulator: the bits of the reference, no fault of memory, graphs, streams and the table's cache."""

from __future__ import annotations

import ctypes
import random
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from adept_fast.ops.adamw import cpu
from adept_fast.ops.adamw.descriptors import group_rows
from adept_fast.ops.adamw.eight_bit import scale_count
from adept_fast.ops.adamw.reference import AdamWOptions, Update, adamw_update_
from adept_fast.ops.adamw.table import Table
from tests.support.adamw_cases import CHUNK, FORMATS, MODES, OPTIONS, UNITS, WRITTEN, Case, assert_same_bits, cases, compare, make, placed
from tests.support.emulated_cuda import Arena, EmulatedCuda, Stream, build, patched_backend

pytestmark = pytest.mark.slow
SPECIAL = torch.tensor([0.0, -0.0, 1e-40, -1e-42, float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 7e4, 1e-8, 2.0**-24])
TABLES = 120


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCuda:
    return EmulatedCuda(build(tmp_path_factory.mktemp("emulator")))


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, native: EmulatedCuda, stream: Stream) -> ModuleType:
    native.library.set_machine(3, 2, ctypes.c_uint64(7))
    native.library.set_mode(0, 0)
    native.written.clear()
    return patched_backend(monkeypatch, native, stream)


# The kernels


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_launches_give_the_bits_of_the_reference(dtype: torch.dtype, native: EmulatedCuda, backend: ModuleType) -> None:
    def run(updates: list[Update], scale: float) -> None:
        backend.adamw(Table(updates), torch.tensor(scale, dtype=torch.float64), None)

    compare(cases(dtype, UNITS), OPTIONS, run, "cpu", 0.37)
    compare(cases(dtype, ("columns", "beyond a chunk"))[::5], OPTIONS._replace(beta1=0.4, beta2=0.3, maximize=True), run, "cpu", 1.0)
    assert native.counts()[1] > 0
    native.assert_no_faults()


bf16, fp32, byte = torch.bfloat16, torch.float32, torch.uint8
SETUPS = [  # in the order of csrc/adamw_table.h: parameter and gradient, moments, master
    (fp32, fp32, None),
    *((bf16, fp32, mode) for mode in (None, "copy", "remainder", "stochastic")),
    *((bf16, bf16, mode) for mode in (None, "remainder", "kahan", "stochastic")),
    (fp32, byte, None),
    *((bf16, byte, mode) for mode in (None, "remainder", "remainder8", "stochastic")),
    (bf16, fp32, "remainder8"),
]


def whole_chunks(number: int, units: bool) -> Update:
    """An update of two whole chunks and a rest, in the set-up of a kernel of its own."""
    dtype, moments, mode = SETUPS[number]
    generator = torch.Generator().manual_seed(number)
    numel = 2 * CHUNK + 64
    aligned = [torch.empty(numel + 16, dtype=kind) for kind in (dtype, dtype, moments, moments)]
    param, grad, m, v = (x[-x.data_ptr() % 16 // x.itemsize :][:numel] for x in aligned)
    for x, scale in ((param, 1.0), (grad, 1.0), (m, 0.05), (v, 0.01)):
        x.copy_(codes(generator, numel) if x.dtype == byte else scale * torch.randn(numel, generator=generator))
    if moments != byte:
        v.abs_()
    param[:12], grad[3:15] = SPECIAL.to(dtype), SPECIAL.to(dtype)
    master = {"copy": param.float() + 1e-4, "remainder": torch.full_like(param, 5, dtype=torch.int16), "kahan": torch.zeros_like(param)}
    master["remainder8"] = torch.full_like(param, -3, dtype=torch.int8)
    multipliers = torch.linspace(0, 2, 8, dtype=fp32) if units else None
    length, inner = (8, numel // 16) if units else (1, 1)
    return Update(
        param, grad, m, v, None, master.get(mode), torch.tensor(4.0), multipliers, length, inner,
        2**32 - 300, number, OPTIONS._replace(master_weights=mode), **block_scales(generator, numel, 64 if moments == byte else 0),
    )  # fmt: skip


def codes(generator: torch.Generator, numel: int) -> Tensor:
    return torch.randint(0, 256, (numel,), generator=generator, dtype=torch.uint8)


def block_scales(generator: torch.Generator, numel: int, row: int) -> dict[str, Any]:
    """The fields of 8-bit moments with rows of `row` elements (0: none). Some scales are 0, tiny, or so large that moments overflow."""
    if row == 0:
        return {}
    usual, rare = 0.05 * torch.rand(2, scale_count(numel, row), generator=generator), torch.tensor([0.0, 1e-30, 1e-42, 3e38, float("inf")])
    chosen = torch.randint(0, 20, usual.shape, generator=generator)
    m, v = torch.where(chosen < len(rare), rare[chosen.clamp(max=len(rare) - 1)], usual)
    return {"exp_avg_scale": m, "exp_avg_sq_scale": v, "row": row}


@pytest.mark.parametrize("units", [False, True])
def test_whole_chunks_of_each_set_up_give_the_bits_of_the_reference(units: bool, native: EmulatedCuda, backend: ModuleType) -> None:
    for options in (OPTIONS, OPTIONS._replace(beta1=0.4), OPTIONS._replace(beta2=0.0, maximize=True, weight_decay=0.0)):
        reference = [whole_chunks(number, units) for number in range(len(SETUPS))]
        reference = [update._replace(options=options._replace(master_weights=update.options.master_weights)) for update in reference]
        ours = [cloned(update) for update in reference]
        chunks = native.adamw_table_size(Table(ours).rows.tobytes())[0]
        assert chunks[int(units) : -1 : 2] == [2] * len(SETUPS) and chunks[-1] == len(SETUPS)
        for _ in range(2):
            backend.adamw(Table(ours), None, None)
            for update in reference:
                adamw_update_(update)
        assert_same_bits(ours, reference, SETUPS)
    native.assert_no_faults()


def cloned(update: Update) -> Update:
    return update._replace(**{name: x.clone() for name, x in update._asdict().items() if isinstance(x, Tensor)})


def random_tensor(draw: random.Random, generator: torch.Generator, numel: int, dtype: torch.dtype, scale: float) -> Tensor:
    values = scale * torch.randn(numel, generator=generator)
    if numel and draw.random() < 0.5:
        at = torch.randint(0, numel, (draw.randint(1, max(1, numel // 4)),), generator=generator)
        values[at] = SPECIAL[torch.randint(0, len(SPECIAL), (len(at),), generator=generator)]
    return values.to(dtype)


def random_update(draw: random.Random, generator: torch.Generator, options: AdamWOptions) -> Update:
    formats = (draw.choice(FORMATS), draw.choice(FORMATS), draw.choice((*FORMATS, byte)))
    dtype, grad, moments = draw.choice([(bf16, bf16, draw.choice([bf16, byte])), formats])
    numel = draw.choice([0, 1, 7, 8, 9, 2047, 2048, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, draw.randint(1, 30_000)])
    beyond = CHUNK + draw.choice([0, 1, 809])
    length, inner = draw.choice([(1, 1), (1, 1), (max(1, numel // 77), 77), (77, 1), (5, 7), (3, beyond), (beyond, 1)])
    if length == 1:
        inner = 1
    multipliers = None
    if length > 1 or draw.random() < 0.3:
        numel = length * inner * draw.randint(1, max(1, min(30_000 // (length * inner), 40))) if length > 1 else numel
        multipliers = 2 * torch.rand(length, generator=generator)
        multipliers[torch.rand(length, generator=generator) < draw.choice([0.0, 0.3, 1.0])] = 0.0
    row = 0
    if moments == byte:
        row = draw.choice([16, 17, 63, 64, 65, 100, 192, 1000])
        rows = draw.choice([1, 3, 4, 128, 130, 30_000 // row]) if row < 200 else draw.choice([1, 9, 17])
        numel = row * rows
        units = [(1, 1), (rows, row), (row, 1), (1, numel), (rows * row, 1), *((e, numel // e) for e in (2, 3) if rows % e == 0)]
        length, inner = draw.choice(units)
        multipliers = None
    if length > 1 and multipliers is None:
        multipliers = 2 * torch.rand(length, generator=generator)
        multipliers[torch.rand(length, generator=generator) < draw.choice([0.0, 0.3, 1.0])] = 0.0
    mode = draw.choice((*MODES[dtype], "remainder8") if dtype == bf16 else MODES[dtype])
    param = random_tensor(draw, generator, numel, dtype, 0.5)
    master = {
        "copy": param.float() + draw.choice([0.0, 1e-4]),
        "remainder": torch.randint(-(2**15), 2**15, (numel,), generator=generator).to(torch.int16),
        "remainder8": torch.randint(-(2**7), 2**7, (numel,), generator=generator).to(torch.int8),
        "kahan": random_tensor(draw, generator, numel, dtype, 1e-4),
    }.get(mode)
    m, v = (codes(generator, numel) if row else random_tensor(draw, generator, numel, moments, scale) for scale in (0.05, 0.01))
    return Update(
        param=param,
        grad=random_tensor(draw, generator, numel, grad, 10 ** draw.uniform(-6, 1)),
        exp_avg=m,
        exp_avg_sq=v if row else v.abs(),
        max_exp_avg_sq=random_tensor(draw, generator, numel, moments, 0.01).abs() if not row and draw.random() < 0.2 else None,
        master=master,
        step=torch.tensor(float(draw.choice([0, 1, 5, 1000, 2**24 - 2]))),
        multipliers=multipliers,
        length=length,
        inner=inner,
        first_index=draw.choice([0, 5, 2**31 - 3, 2**32 - 300, 2**40 + 1]),
        seed=draw.choice([0, 77, 2**31, 2**32 - 1]),
        options=options._replace(master_weights=mode),
        **block_scales(generator, numel, row),
    )


def random_options(draw: random.Random) -> AdamWOptions:
    def number(low: float, high: float, *others: float) -> float | Tensor:
        value = draw.choice([*others, draw.uniform(low, high)])
        return torch.tensor(value, dtype=draw.choice([torch.float32, torch.float64])) if draw.random() < 0.15 else value

    lr, beta1, beta2 = number(1e-5, 1e-2, 0.0), number(0.0, 0.99, 0.5, 0.9), number(0.4, 0.999, 0.5, 0.0)
    return AdamWOptions(lr, beta1, beta2, draw.choice([1e-8, 0.0]), draw.choice([0.0, 0.1]), draw.random() < 0.3, None)


@pytest.mark.parametrize("seed", range(4))
def test_random_tables_give_the_bits_of_the_reference_and_touch_nothing_else(seed: int, native: EmulatedCuda) -> None:
    """Of odd sizes, alignments, units, formats and masters, in up to 900 groups, run at once or in the order of their streams."""
    for number in range(TABLES // 4):
        draw = random.Random(f"{seed} {number}")
        generator = torch.Generator().manual_seed(1000 * seed + number)
        groups = [random_options(draw) for _ in range(draw.choice([1, 2, 5, 401, 900] if number % 5 == 0 else [1, 2, 5]))]
        updates = [random_update(draw, generator, draw.choice(groups)) for _ in range(draw.choice([1, 2, 5]))]
        tiny = next(update for _ in range(99) if not (update := random_update(draw, generator, groups[0])).row)
        fields = {name: None if getattr(tiny, name) is None else getattr(tiny, name)[:1] for name in Update._fields[:6]}
        tiny = tiny._replace(**fields, multipliers=None, length=1, inner=1, step=torch.tensor(3.0))
        mode = tiny.options.master_weights
        updates += [cloned(tiny)._replace(options=group._replace(master_weights=mode)) for group in groups[5:]]
        reference = [placed(update, "cpu") for update in updates]
        arena = Arena(native.library, 2**23)
        shift = draw.choice([(0,), (0, 0, 0, 1, 2, 3, 5, 7)])
        ours = []
        scalars: dict[int, Tensor] = {}
        for update in updates:
            options = update.options
            for name in ("lr", "beta1", "beta2"):
                value = getattr(options, name)
                if isinstance(value, Tensor):
                    if id(value) not in scalars:
                        scalars[id(value)] = arena.placed(value, 0, False)
                    options = options._replace(**{name: scalars[id(value)]})
            tensors = {name: x for name, x in update._asdict().items() if isinstance(x, Tensor)}
            shifts = {name: 0 if name in ("step", "multipliers") else draw.choice(shift) for name in tensors}
            copies = {name: arena.placed(x, shifts[name], name in WRITTEN) for name, x in tensors.items()}
            ours.append(update._replace(**copies, options=options))
        scale = draw.choice([None, torch.tensor(0.37, dtype=torch.float64), torch.tensor(float("nan"), dtype=torch.float64)])
        found_inf = draw.choice([None, torch.zeros(()), torch.ones(())])
        native.library.set_machine(draw.choice([1, 2, 7]), draw.choice([1, 2]), ctypes.c_uint64(number))
        native.library.set_mode(int(draw.random() < 0.5), 0)
        table = Table(ours)
        rows = table.rows.tobytes()
        chunks, size = native.adamw_table_size(rows)
        memory = torch.full((size + 64,), 0xA5, dtype=torch.uint8)
        native.adamw_write_table(0, 5, memory.data_ptr(), chunks, rows)
        steps = draw.choice([1, 2])
        for _ in range(steps):
            addresses = (0 if x is None else x.data_ptr() for x in (scale, found_inf))
            native.adamw_step(0, 5, memory.data_ptr(), len(ours), chunks, group_rows(table.options), *addresses)
        native.library.drain()
        arena.close()
        native.assert_no_faults()
        assert bool((memory[size:] == 0xA5).all()), "written beyond the table"
        for _ in range(steps):
            cpu.adamw(Table(reference), scale, found_inf)
        assert_same_bits(ours, reference, [(seed, number, i) for i in range(len(ours))])


# The Python side


class KeepingTorch:
    """torch, with all memory that was asked for kept, as a graph keeps its own."""

    def __init__(self) -> None:
        self.memory: list[Tensor] = []

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(self, *shape: int, **options: object) -> Tensor:
        self.memory.append(torch.empty(*shape, **options))
        return self.memory[-1]


def chosen() -> list[Case]:
    return [case for dtype in FORMATS for case in cases(dtype, ("rows", "columns", "none"))[::11]]


def test_a_captured_step_is_replayed_from_a_table_of_its_own(
    backend: ModuleType, native: EmulatedCuda, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeepingTorch()
    monkeypatch.setattr(backend, "torch", kept)
    names = chosen()
    reference = [make(case, seed) for seed, case in enumerate(names)]
    ours = [placed(update, "cpu") for update in reference]
    scale, found_inf = torch.tensor(0.37, dtype=torch.float64), torch.zeros(())

    def expect_step() -> None:
        for update in reference:
            adamw_update_(update, scale)

    backend.adamw(Table(ours), scale, found_inf)
    expect_step()
    native.library.set_mode(0, 1)
    stream.capturing, stream.cuda_stream = True, 7
    backend.adamw(Table(ours), scale, found_inf)
    stream.capturing, stream.cuda_stream = False, 0
    native.library.set_mode(0, 0)
    of_eager_steps = {sent.memory.data_ptr() for sent in backend._tables.values()}
    assert len(native.written) == 2 and native.written[-1] not in of_eager_steps
    for _ in range(3):
        kept.memory[-1].fill_(0xEE)  # the pool's memory was used for something else
        native.library.replay()
        expect_step()
        backend.adamw(Table(ours), scale, found_inf)
        expect_step()
    assert_same_bits(ours, reference, names)
    found_inf.fill_(1.0)
    native.library.replay()
    assert_same_bits(ours, reference, names)
    assert len(native.written) == 2, "eager steps write the table once"
    native.assert_no_faults()


def test_moved_gradients_are_read_at_their_new_addresses(backend: ModuleType, native: EmulatedCuda) -> None:
    names = chosen()
    reference = [make(case, seed) for seed, case in enumerate(names)]
    ours = [placed(update, "cpu") for update in reference]
    for _ in range(3):
        ours = [update._replace(grad=update.grad.clone()) for update in ours]
        backend.adamw(Table(ours), None, None)
        for update in reference:
            adamw_update_(update)
    assert_same_bits(ours, reference, names)
    assert len(native.written) == 3


def test_streams_have_tables_of_their_own(backend: ModuleType, native: EmulatedCuda, stream: Stream) -> None:
    names = chosen()
    reference = [make(case, seed) for seed, case in enumerate(names)]
    ours = [placed(update, "cpu") for update in reference]
    native.library.set_mode(1, 0)
    for handle in (3, 4, 3, 4):
        stream.cuda_stream = handle
        backend.adamw(Table(ours), None, None)
        native.library.drain()  # as a wait for the other stream
        for update in reference:
            adamw_update_(update)
    assert_same_bits(ours, reference, names)
    assert len(native.written) == 2 and len(set(native.written)) == 2


def test_cached_tables_are_bounded_in_bytes(backend: ModuleType, native: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((torch.float32,) * 3, None, False, "none", 0)
    updates = [make(case, seed) for seed in range(3)]
    tables = [Table([update]) for update in updates]
    size = native.adamw_table_size(tables[0].rows.tobytes())[1]
    monkeypatch.setattr(backend, "CACHED_BYTES", 2 * size)
    for table in (*tables[:2], tables[0], tables[2], tables[0], tables[1]):  # the third displaces the second, which is used least
        backend.adamw(table, None, None)
    assert len(native.written) == 4 and len(backend._tables) == 2
    backend.adamw(Table(updates[:1], recurs=False), None, None)
    assert len(native.written) == 5 and len(backend._tables) == 2, "the table of a compiled step is not kept"


def test_a_small_step_copies_few_bytes_of_parameters(backend: ModuleType, native: EmulatedCuda) -> None:
    native.counts()
    backend.adamw(Table([make(Case((torch.float32,) * 3, None, False, "none", 0), 1)]), None, None)
    launches, _, largest = native.counts()
    assert launches == 4 and largest < 4096  # the table, its map, the steps, the update

"""The CUDA backend without a GPU: its grid and kernel body on the host against the reference's bits, and its machine code."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from adept_fast.ops.adamw.descriptors import WORD, WORDS, GradientRow, GroupRow, TensorRow, group_rows
from adept_fast.ops.adamw.reference import Update
from adept_fast.ops.adamw.table import Columns, Table
from adept_fast.ops.number_formats import FORMATS as NATIVE_FORMATS
from adept_fast.ops.number_formats import MODES
from tests.support.adamw_cases import CHUNK, FORMATS, OPTIONS, UNITS, Case, assert_same_bits, cases, compare, make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the grid on the host needs g++")
    target = tmp_path_factory.mktemp("grid") / "grid.so"
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}")
    subprocess.run([compiler, *flags, str(ROOT / "tests" / "support" / "cuda_grid.cpp"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.step.restype = library.unit_of.restype = ctypes.c_int64
    return library


def row(numel: int, length: int, inner: int) -> array[int]:
    words = array("q", [0] * WORDS)
    words[WORD.numel], words[WORD.length], words[WORD.inner] = numel, length, inner
    return words


def declared(header: str, name: str) -> tuple[str, ...]:
    """The members of a struct, or the numbers of an enum's by their names, as csrc/`header` has them, in order."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / header).read_text(encoding="utf-8"))
    body = re.search(rf"(?:struct|enum) {name}\b[^{{]*{{(.*?)}};", text, re.DOTALL)
    assert body is not None, (header, name)
    members = [part.replace("std::int64_t", "").replace("double", "").strip() for part in re.split(r"[;,]", body[1])]
    return tuple(member for member in members if member)


def test_python_declares_the_words_in_the_order_of_the_structs() -> None:
    assert TensorRow._fields == declared("descriptor.h", "Tensor")
    assert GroupRow._fields == declared("descriptor.h", "Group")
    assert GradientRow._fields == declared("cpu_adamw.h", "Gradient")
    formats = {torch.float32: "kFp32", torch.bfloat16: "kBf16", torch.float16: "kFp16", torch.float64: "kFp64"}
    assert tuple(f"{formats[dtype]} = {number}" for dtype, number in NATIVE_FORMATS.items()) == declared("descriptor.h", "Format")
    assert tuple(f"k{(mode or 'direct').title()} = {number}" for mode, number in MODES.items()) == declared("descriptor.h", "Master")


def test_a_table_has_the_fields_of_its_updates() -> None:
    assert Columns._fields == Update._fields
    updates = [make(Case((torch.bfloat16,) * 3, "kahan", True, "rows", 1), seed) for seed in (5, 6)]
    table = Table(updates)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step", "multipliers"):
        assert [*table.rows[getattr(WORD, name) :: WORDS]] == [getattr(update, name).data_ptr() for update in updates]
    for name in ("length", "inner", "first_index", "seed"):
        assert [*table.rows[getattr(WORD, name) :: WORDS]] == [getattr(update, name) for update in updates]
    assert [*table.rows[WORD.numel :: WORDS]] == [1001, 1001] and [*table.rows[WORD.group :: WORDS]] == [0, 1]
    assert [*table.rows[WORD.formats :: WORDS]] == [0b010101] * 2 and [*table.rows[WORD.mode :: WORDS]] == [MODES["kahan"]] * 2


def address(words: array[int]) -> ctypes.c_void_p:
    return ctypes.c_void_p(words.buffer_info()[0])


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 3, 264])
def test_every_element_is_visited_once_with_its_multiplier(grid: ctypes.CDLL, blocks: int) -> None:
    shapes = [(0, 1, 1), (0, 4, 2), (1, 1, 1), (7, 7, 1), (0, 1, 1), (8, 2, 4), (9, 1, 1), (2049, 3, 683), (CHUNK, 16, 512), (0, 5, 3)]
    shapes += [(CHUNK + 1, 3, 2731), (3 * CHUNK - 5, 7, 3), (30_003, 10_001, 3), (40_004, 2, 20_002), (50_000, 1, 1), (40_960, 8192, 5)]
    shapes += [(20_000, 1, 20_000), (24_579, 8193, 3), (49_158, 3, 8193), (49_152, 3, 8192), (0, 1, 1)]
    rows, begin = array("q"), array("q")
    total = 0
    for shape in shapes:
        rows.extend(row(*shape))
        begin.append(total)
        total += shape[0]
    visits, units = torch.zeros(total, dtype=torch.uint8), torch.full((total,), -1)
    grid.visit(
        address(rows), ctypes.c_int64(len(shapes)), ctypes.c_int64(blocks), address(begin), ctypes.c_void_p(visits.data_ptr()),
        ctypes.c_void_p(units.data_ptr()),
    )  # fmt: skip
    assert bool((visits == 1).all())
    expected = [torch.arange(numel) // inner % length for numel, length, inner in shapes]
    assert torch.equal(units, torch.cat(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "inner"), [(1, 2**40), (3, 2**33 + 7), (2**20 + 1, 2**15 + 1), (2**33 + 1, 1), (2**34, 3), (5, 2**31), (8192, 8192), (7, 3)]
)
def test_multipliers_of_large_tensors(grid: ctypes.CDLL, length: int, inner: int) -> None:
    words = row(2**45, length, inner)
    for chunk in (0, 1, 2**18 - 1, 2**18, 2**20 + 3, (2**33 + 7) // CHUNK, 2**27 + 1, 2**32 - 1):
        for offset in (0, 1, 5, 8, 4097, CHUNK - 1):
            unit = grid.unit_of(address(words), ctypes.c_int64(chunk), ctypes.c_uint32(offset))
            assert unit == (chunk * CHUNK + offset) // inner % length


def on_host(grid: ctypes.CDLL, updates: Sequence[Update], blocks: int, grad_scale: float = 1.0) -> int:
    table = Table(updates)
    groups = ctypes.create_string_buffer(group_rows(table.options))
    return grid.step(address(table.rows), ctypes.c_int64(len(updates)), groups, ctypes.c_int64(blocks), ctypes.c_double(grad_scale))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("blocks", [1, 5])
def test_the_kernel_body_gives_the_reference_bits(grid: ctypes.CDLL, dtype: torch.dtype, blocks: int) -> None:
    def run(updates: list[Update], scale: float) -> None:
        assert on_host(grid, updates, blocks, scale) > 0

    small = [name for name in UNITS if "chunk" not in name]
    compare(cases(dtype, small), OPTIONS, run, "cpu", 0.37)


@pytest.mark.slow
def test_the_kernel_body_over_several_chunks_with_other_options(grid: ctypes.CDLL) -> None:
    """Averages that move from the new value, maximize, no decay."""

    def run(updates: list[Update], scale: float) -> None:
        assert on_host(grid, updates, 2, scale) > 0

    chosen = [case for dtype in FORMATS for case in cases(dtype, ("beyond a chunk", "more than a chunk"))[::7]]
    compare(chosen, OPTIONS._replace(beta1=0.4, beta2=0.3, maximize=True), run, "cpu", 1.0)
    compare(chosen[:4], OPTIONS._replace(beta1=0.0, weight_decay=0.0), run, "cpu", 1.0)


@pytest.mark.slow
def test_tensor_lr_and_betas_are_read_through_their_addresses(grid: ctypes.CDLL) -> None:
    case = Case((torch.bfloat16, torch.bfloat16, torch.float32), "remainder", True, "rows", 0)
    plain, scalars = make(case, 7, OPTIONS._replace(beta1=0.75)), make(case, 7)
    tensors = (torch.tensor(3e-3, dtype=torch.float64), torch.tensor(0.75), torch.tensor(0.97, dtype=torch.float64))
    scalars = scalars._replace(options=scalars.options._replace(lr=tensors[0], beta1=tensors[1], beta2=tensors[2]))
    on_host(grid, [plain], 1)
    on_host(grid, [scalars], 1)
    assert_same_bits([scalars], [plain], [case])
    tensors[0].fill_(1.0)
    on_host(grid, [scalars], 1)
    on_host(grid, [plain], 1)
    assert not torch.equal(scalars.param, plain.param)


# Machine code


@pytest.fixture(scope="session")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adept_fast._CUDA as installed, or built here."""
    found = importlib.util.find_spec("adept_fast._CUDA")
    if found is not None and found.origin is not None:
        return Path(found.origin)
    home = os.environ.get("CUDA_HOME")
    if shutil.which("nvcc") is None and (home is None or shutil.which("nvcc", path=os.path.join(home, "bin")) is None):
        pytest.skip("building adept_fast._CUDA needs nvcc")
    pytest.importorskip("pybind11")
    target = tmp_path_factory.mktemp("extension")
    command = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target), "--build-temp", str(target / "temp"))
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"ADEPT_FAST_BUILD_CUDA": "1"})
    return next(target.glob("adept_fast/_CUDA*"))


@pytest.mark.slow
def test_rows_have_the_size_of_the_structs(extension: Path) -> None:
    spec = importlib.util.spec_from_file_location("_CUDA", extension)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    update = make(Case((torch.float32,) * 3, None, False, "rows", 0), 0)
    table = Table([update])
    rows = table.rows
    assert native.struct_bytes() == {"Tensor": 8 * len(rows), "Group": len(group_rows(table.options)), "StepScalars": 56}
    assert native.adamw_table_size(rows)[0] == -(-update.param.numel() // CHUNK)
    with pytest.raises(ValueError, match="rows of 128 bytes"):
        native.adamw_table_size(rows[:-1])


def dumped(extension: Path, *options: str) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := importlib.util.find_spec("triton")) is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(bundled) if bundled.exists() else None
    if tool is None:
        pytest.skip("reading machine code needs cuobjdump, of the CUDA toolkit or of Triton")
    return subprocess.run([tool, *options, str(extension)], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_update_kernel_is_wide_and_spills_nothing(extension: Path) -> None:
    functions = re.split(r"Function : ", dumped(extension, "-sass"))[1:]
    updates = [text for text in functions if re.match(r"_ZN10adept_fast\S*6updateE", text)]
    assert len(updates) >= 1
    for text in updates:
        assert len(re.findall(r"\bLDG\.E\S*\.128\b", text)) >= 6 and len(re.findall(r"\bSTG\.E\S*\.128\b", text)) >= 5
        assert not re.search(r"\b(LDL|STL)\b", text), "local memory"
        assert not re.search(r"\b(LD|ST)\.E\b", text), "generic addresses"
    pattern = r"Function _ZN10adept_fast\S*6updateE\S*:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    usage = re.findall(pattern, dumped(extension, "-res-usage"))
    assert len(usage) == len(updates)
    assert all(int(registers) <= 128 and stack == local == "0" for registers, stack, local in usage)

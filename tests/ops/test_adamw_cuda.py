"""The CUDA backend without a GPU: its grid on the host, and its machine code. test_adamw_emulated.py runs its launches."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from array import array
from pathlib import Path
from types import ModuleType

import pytest
import torch

from adept_fast.ops.adamw.descriptors import WORD, WORDS, GradientRow, GroupRow, TensorRow, group_rows
from adept_fast.ops.adamw.reference import Update
from adept_fast.ops.adamw.table import Columns, Table
from adept_fast.ops.number_formats import FORMATS as NATIVE_FORMATS
from adept_fast.ops.number_formats import MODES
from tests.support.adamw_cases import CHUNK, Case, make
from tests.support.machine_code import functions, loops

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
    library.unit_of.restype = ctypes.c_int64
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
    formats = {torch.float32: "kFp32", torch.bfloat16: "kBf16", torch.float16: "kFp16", torch.float64: "kFp64", torch.uint8: "k8Bit"}
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
@pytest.mark.parametrize(("blocks", "gap"), [(1, 4), (3, 128), (264, 4), (264, 128)])
def test_every_element_is_visited_once_with_its_multiplier(grid: ctypes.CDLL, blocks: int, gap: int) -> None:
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
        address(rows), ctypes.c_int64(len(shapes)), ctypes.c_int64(blocks), ctypes.c_uint32(gap), address(begin),
        ctypes.c_void_p(visits.data_ptr()), ctypes.c_void_p(units.data_ptr()),
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


def loaded(extension: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_CUDA", extension)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native


@pytest.mark.slow
def test_rows_have_the_size_of_the_structs(extension: Path) -> None:
    native = loaded(extension)
    update = make(Case((torch.float32,) * 3, None, False, "rows", 0), 0)
    table = Table([update])
    rows = table.rows
    assert native.struct_bytes() == {"Tensor": 8 * len(rows), "Group": len(group_rows(table.options)), "StepScalars": 56}
    assert sum(native.adamw_table_size(rows)[0]) == -(-update.param.numel() // CHUNK)
    with pytest.raises(ValueError, match=f"rows of {8 * WORDS} bytes"):
        native.adamw_table_size(rows[:-1])


def dumped(extension: Path, *options: str) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := importlib.util.find_spec("triton")) is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(bundled) if bundled.exists() else None
    if tool is None:
        pytest.skip("reading machine code needs cuobjdump, of the CUDA toolkit or of Triton")
    return subprocess.run([tool, *options, str(extension)], capture_output=True, text=True, check=True).stdout


# In the order of kSetups in csrc/adamw_table.h: bytes moved per element, ceiling of the share of issue slots, accesses of 16 bytes.
SETUPS: dict[str, tuple[float, float, int]] = {
    "fp32": (28, 0.80, 14),
    "bf16, fp32 moments": (22, 0.80, 8),
    "bf16, fp32 moments, copy": (28, 0.80, 12),
    "bf16, fp32 moments, remainder": (26, 0.80, 8),
    "bf16, fp32 moments, stochastic": (22, 0.95, 8),
    "all bf16": (14, 0.80, 7),
    "all bf16, remainder": (18, 0.80, 9),
    "all bf16, kahan": (18, 0.80, 9),
    "all bf16, stochastic": (14, 0.95, 7),
    "fp32, 8-bit moments": (16.25, 0.80, 6),
    "bf16, 8-bit moments": (10.25, 1.05, 3),
    "bf16, 8-bit moments, remainder": (14.25, 0.85, 5),
    "bf16, 8-bit moments, remainder8": (12.25, 1.05, 3),
    "bf16, 8-bit moments, stochastic": (10.25, 1.40, 3),
    "bf16, fp32 moments, remainder8": (24, 0.80, 8),
}
# Of an H200: its schedulers issue 33.4e12 instructions of single threads a second, its copy moves 4.3e12 bytes.
SLOTS_PER_BYTE = 132 * 4 * 32 * 1.98e9 / 4.3e12


@pytest.mark.slow
def test_whole_chunks_leave_issue_slots_at_the_speed_of_memory(extension: Path) -> None:
    """Counted in each built architecture, along the way of eight elements of one rate. 8-bit moments have a longer one for NaN."""
    found: dict[int, list[int]] = {}
    for (_, name), code in functions(dumped(extension, "-sass")).items():
        if (kernel := re.search(r"update_wholeILi(\d+)E", name)) is None or int(kernel[1]) % 2:
            continue
        setup = [*SETUPS][int(kernel[1]) // 2]
        size, share, accesses = SETUPS[setup]
        shortest, longest = (max(loops(code, choose), key=len) for choose in (min, max))
        blocks = "8-bit" in setup  # whose scales take one division more
        assert sum(each.name.startswith("MUFU.RCP") for each in shortest) == 8 + blocks, setup
        assert len(longest) - len(shortest) <= 130 * blocks, setup
        assert sum(each.name.startswith(("LDG", "STG")) and ".128" in each.name for each in shortest) == accesses, setup
        assert len(shortest) <= share * SLOTS_PER_BYTE * 8 * size, setup
        found.setdefault(int(kernel[1]) // 2, []).append(len(shortest))
    built = sum("sm_" in name for name in loaded(extension).architectures())
    assert {kernel: len(counts) for kernel, counts in found.items()} == dict.fromkeys(range(len(SETUPS)), built)


@pytest.mark.slow
def test_update_kernels_spill_nothing_and_leave_room_for_others(extension: Path) -> None:
    for (_, name), code in functions(dumped(extension, "-sass")).items():
        if "update_" in name:
            names = {each.name for each in code}
            assert "rest" in name or not any(each.startswith(("LDL", "STL")) for each in names), "local memory"
            assert not names & {"LD.E", "ST.E"}, "generic addresses"
    pattern = r"update_(?:wholeILi(\d+)E|rest)\S*:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    usage = re.findall(pattern, dumped(extension, "-res-usage"))
    assert len(usage) >= 2 * len(SETUPS) + 1
    for kernel, registers, stack, local in usage:
        assert local == "0" and int(stack) <= (0 if kernel else 32), "the rest may keep a few registers on the stack"
        plain = kernel and int(kernel) % 2 == 0
        assert int(registers) <= (80 if plain else 128), "three blocks a multiprocessor, of others two"

"""What is imported when, and what the repository's layout promises to packaging."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import adept_fast

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'transformers', 'triton', 'datasets', 'accelerate', 'matplotlib')"
    assert python(f"import sys, adept_fast; print([name for name in {heavy} if name in sys.modules])") == "[]"


def installed_with(name: str) -> set[str]:
    """The distribution `name` and what it requires here, without extras."""
    found, waiting = set(), [name]
    while waiting:
        current = canonicalize_name(waiting.pop())
        if current in found:
            continue
        found.add(current)
        for line in metadata.requires(current) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.mark.slow
def test_the_optimizer_needs_torch_alone(tmp_path: Path) -> None:
    """In an environment that holds torch, what torch requires, and this package."""
    for name in installed_with("torch"):
        for file in metadata.files(name) or []:
            top = tmp_path / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not top.exists():
                top.symlink_to(Path(str(metadata.distribution(name).locate_file(file.parts[0]))))
    (tmp_path / "adept_fast").symlink_to(ROOT / "adept_fast")
    code = f"""
import sys
sys.path[:] = [path for path in sys.path if not path.endswith("-packages")] + [{str(tmp_path)!r}]
from importlib.util import find_spec
import torch, adept_fast
assert not [name for name in ("transformers", "triton", "accelerate", "yaml", "tqdm", "safetensors") if find_spec(name)]
p = torch.nn.Parameter(torch.tensor([1.5, -2.5]))
p.grad = torch.tensor([0.3, -0.7])
adept_fast.AdamW([p], lr=1e-2, weight_decay=0.1).step()
print([round(x, 4) for x in p.tolist()])
try:
    adept_fast.score_layers
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    step, missing = done.stdout.strip().splitlines()
    assert step == "[1.4885, -2.4875]"
    assert re.fullmatch(r"adept_fast\.score_layers needs \w+: pip install 'adept-fast\[hf\]'", missing)


@pytest.mark.slow
def test_transformers_imports_from_the_root() -> None:
    """Hugging Face has a package named kernels; transformers probes for it, and finds our folder in the working directory."""
    pytest.importorskip("transformers")
    assert python("import sys; sys.path.insert(0, ''); from transformers import LlamaForCausalLM; print('whole')") == "whole"


@pytest.mark.slow
def test_kernels_is_the_linked_folder() -> None:
    link = ROOT / "adept_fast" / "kernels"
    assert link.is_symlink() and str(link.readlink()) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert python("import adept_fast.kernels as k; print(list(k.__path__)[0])") == str(link)


@pytest.mark.slow
def test_kernels_import_as_a_subpackage() -> None:
    pytest.importorskip("triton")
    assert python("from adept_fast.kernels.gradient_sums import tile; print(tile.__module__)") == "adept_fast.kernels.gradient_sums"


def test_native_code_includes_no_torch_header() -> None:
    sources = sorted((ROOT / "csrc").iterdir())
    assert sources
    for source in sources:
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)\b', source.read_text()), source.name


@pytest.mark.parametrize("name", adept_fast.__all__)
def test_public_name_imports_and_is_documented(name: str) -> None:
    if adept_fast._MODULES[name] not in ("adept_fast.errors", "adept_fast.optim"):
        pytest.importorskip("transformers")
    assert getattr(adept_fast, name).__doc__
    assert name in dir(adept_fast)


def test_public_names_are_sorted_and_complete() -> None:
    assert adept_fast.__all__ == sorted(adept_fast._MODULES)
    tree = ast.parse((ROOT / "adept_fast" / "__init__.py").read_text())  # what type checkers and editors read
    seen = {alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name: module for name, module in seen.items() if module.startswith("adept_fast")} == adept_fast._MODULES


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AdamX'"):
        _ = adept_fast.AdamX

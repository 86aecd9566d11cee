"""The sdist installs where nothing can be compiled. It then steps in plain torch, and `adept-fast info` says what is missing."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = """
import torch, adept_fast
p = torch.nn.Parameter(torch.tensor([1.5, -2.5]))
p.grad = torch.tensor([0.3, -0.7])
adept_fast.AdamW([p], lr=1e-2, weight_decay=0.1).step()
print(adept_fast.__file__, [round(x, 4) for x in p.tolist()])
"""


def run(*command: object, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CUDA_HOME")}
    done = subprocess.run([*map(str, command)], cwd=variables.pop("cwd", "."), env=kept | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_it_installs_steps_and_says_so(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (own,) = venv.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()))  # torch, and setuptools and pybind11 for the build
    nothing = {"PATH": str(venv / "bin"), "CC": "false", "CXX": "false"}
    run(sys.executable, "-m", "pip", "--python", venv, "install", "--no-index", "--no-build-isolation", "--no-deps", sdist, **nothing)
    assert not list((own / "adept_fast").glob("*.so"))
    where, _, stepped = run(venv / "bin" / "python", "-c", STEP, cwd=str(tmp_path)).strip().partition(" ")
    assert Path(where).is_relative_to(venv) and stepped == "[1.4885, -2.4875]"
    said = run(venv / "bin" / "adept-fast", "info", cwd=str(tmp_path))
    assert "cpu     not found: the C++ extension was not built" in said
    assert "remedy: install a C++17 compiler and reinstall from source" in said and "torch   found: " in said

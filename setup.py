"""Builds the extensions adept_fast._C (C++) and, if nvcc is found, adept_fast._CUDA. The package works without those that cannot be built.

ADEPT_FAST_BUILD_CUDA=0: do not build _CUDA. ADEPT_FAST_BUILD_CUDA=1: fail if it cannot be built.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ARCHITECTURES = (80, 90, 100)
CUDA_NAME = "adept_fast._CUDA"


class BuildNative(build_ext):
    """Builds extensions, and prints one line on stderr for one that cannot be built instead of failing the installation."""

    def build_extensions(self) -> None:
        built = []
        with ThreadPoolExecutor() as pool:
            building = [pool.submit(self.build_extension, extension) for extension in self.extensions]
        for extension, result in zip(self.extensions, building, strict=True):
            required = extension.name == CUDA_NAME and os.environ.get("ADEPT_FAST_BUILD_CUDA") == "1"
            try:
                result.result()
            except (BaseError, CCompilerError, OSError) as error:
                if required:
                    raise
                print(f"{extension.name} is left out: {error}", file=sys.stderr)
            else:
                built.append(extension)
        # Later steps of setuptools copy every extension in this list.
        self.extensions[:] = built

    def build_extension(self, extension: Extension) -> None:
        if extension.name != CUDA_NAME:
            super().build_extension(extension)
            return
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        supported = _run(nvcc, "--list-gpu-arch").split()
        architectures = [number for number in ARCHITECTURES if f"compute_{number}" in supported]
        if not architectures:
            raise CCompilerError(f"{nvcc} supports none of sm_{', sm_'.join(map(str, ARCHITECTURES))}")
        newest = architectures[-1]
        _run(
            nvcc,
            *("-std=c++17", "-O3", "--threads", "0", "--shared", "--cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
            "--fmad=false",  # for the same bits as on the CPU
            *(f"--generate-code=arch=compute_{number},code=sm_{number}" for number in architectures),
            f"--generate-code=arch=compute_{newest},code=compute_{newest}",
            f"-DADEPT_FAST_PTX={newest}",
            *(f"-I{folder}" for folder in (*extension.include_dirs, *self.include_dirs)),
            *extension.sources,
            *("-o", str(target)),
        )


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")
    if not found:
        raise CCompilerError("no nvcc on PATH or in $CUDA_HOME/bin")
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise CCompilerError(next((line for line in lines if "error" in line.lower()), lines[-1]))
    return done.stdout


def extensions() -> list[Extension]:
    native: list[Extension] = [
        Pybind11Extension(
            "adept_fast._C",
            sorted(glob("csrc/cpu*.cpp")) + ["csrc/parallel.cpp"],
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # No contraction: every operation is rounded once, as on a GPU. No errno and traps, so that loops with square roots vectorise.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            libraries=["dl"] if sys.platform == "linux" else [],
        )
    ]
    if os.environ.get("ADEPT_FAST_BUILD_CUDA") != "0":
        sources = ["csrc/cuda.cu", "csrc/adamw.cu", "csrc/cuda_bindings.cpp"]
        native.append(Extension(CUDA_NAME, sources, include_dirs=[pybind11.get_include()], depends=sorted(glob("csrc/*.h"))))
    return native


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})

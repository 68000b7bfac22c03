"""Builds the C++ core with CMake and ninja; everything else is declared in pyproject.toml.

``FASTVAE_BUILD_CPU=0`` skips the build: the package then runs on its reference path.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake",
            "-S", str(ROOT / "csrc"),
            "-B", str(build),
            "-G", "Ninja",
            "--fresh",  # an isolated build's pybind11 is gone afterwards, and a cache would still point at it
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTVAE_OUTPUT_DIR={target.parent}",
            f"-DFASTVAE_OUTPUT_NAME={target.name.removesuffix('.so').removesuffix('.pyd')}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"fastvae: building the C++ core failed ({error}). It needs a C++17 compiler; set "
                "FASTVAE_BUILD_CPU=0 to install without it (slower: the reference path is used on CPU)."
            ) from error


build_cpu = os.environ.get("FASTVAE_BUILD_CPU", "1") != "0"
setup(
    packages=[*find_packages(include=["fastvae*"]), "fastvae.kernels"],
    # The GPU kernels live beside csrc/ in the tree; installed at top level, `kernels` would collide.
    package_dir={"fastvae.kernels": "kernels"},
    ext_modules=[Extension("fastvae._C", sources=[])] if build_cpu else [],
    cmdclass={"build_ext": CMakeBuild},
)

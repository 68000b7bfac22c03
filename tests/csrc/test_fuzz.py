"""Every C++ entry point with random arguments, in a program built with the compiler's sanitizers (fuzz.cpp)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# cmake and ninja as the environment has them, activated or not.
ENVIRONMENT = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def run(*command):
    finished = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finished.returncode == 0, finished.stdout[-20_000:]
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_entry_points_are_clean(sanitizer):
    """`FUZZ` holds further arguments for fuzz; what was built stays for the next time."""
    build = ROOT / "build" / f"fuzz-{sanitizer.partition(',')[0]}"
    cmake = shutil.which("cmake", path=ENVIRONMENT["PATH"])
    assert cmake, "cmake comes with the packages of the tests: pip install -e '.[test]'"
    run(cmake, "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DFASTVAE_SANITIZE={sanitizer}")  # fmt: skip
    run(cmake, "--build", build)
    told = run(build / "fuzz", *os.environ.get("FUZZ", "").split())
    print(told)
    assert " cases in " in told

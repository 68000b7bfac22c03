"""Every kernel compiles for sm_80 and sm_90, within limits, as kernels/RESOURCES.md says; no GPU needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvae.kernels import lstm

SCRIPT = Path(__file__).with_name("resources.py")
KERNELS = Path(__file__).parents[2] / "kernels"
MAX_SPILLED_BYTES = 64  # stored and loaded: a few scalars at most
MAX_SHARED_BYTES = 99 * 1024  # of a program on sm_86 and sm_89; sm_80 has 163 KiB, sm_90 227 KiB


pytestmark = pytest.mark.slow  # compiles over a hundred kernels


def output_of_script(option: str, cache: Path) -> str:
    # A process of its own: kernels imported under the interpreter cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), option], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(output_of_script("--json", tmp_path_factory.mktemp("triton")))


def test_sizes_of_one_compile(tmp_path: Path) -> None:
    """Triton makes a constant of an argument that is 1, which the interpreter does not."""
    assert int(output_of_script("--smallest", tmp_path)) > 40


def test_every_kernel_is_compiled(compiled: dict[str, Any]) -> None:
    written = {
        name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    }
    assert len(written) > 5
    for architecture in (80, 90):
        assert {row["kernel"] for row in compiled["rows"] if row["sm"] == architecture} == written


def test_spills_and_shared_memory(compiled: dict[str, Any]) -> None:
    for row in compiled["rows"]:
        assert row["spills"] <= MAX_SPILLED_BYTES, row
        on_chip = re.fullmatch(r"LSTM of (\d+) units in .*?(16|32)", row["case"])
        if on_chip and "sequence" in row["kernel"]:  # chosen by what the GPU has
            size, bits = map(int, on_chip.groups())
            assert row["shared"] <= lstm._shared_bytes(size, bits // 8) <= 163 * 1024, row
        else:
            assert row["shared"] <= MAX_SHARED_BYTES, row


def test_table_is_current(compiled: dict[str, Any]) -> None:
    table = (KERNELS / "RESOURCES.md").read_text()
    if f"Triton {compiled['triton']};" in table:
        assert table == compiled["table"], f"run: python tests/kernels/{SCRIPT.name}"
    else:  # another version of Triton compiles the same kernels to other numbers
        cases = re.compile(r"^\| (\w+_kernel \| [^|]+) \|", re.M)
        assert cases.findall(table) == cases.findall(compiled["table"])

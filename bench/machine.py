"""The machine a benchmark ran on, and the two rates that bound what any implementation can reach there."""

import datetime
import importlib.metadata
import os
import platform
import time
from typing import Any

import cpuinfo
import torch

from fastvae.ops.backend import cpu_isa


def describe() -> dict[str, Any]:
    """Return what a row must name to be compared with another, and how busy the machine was."""
    return {
        "threads": torch.get_num_threads(),
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "isa": cpu_isa() or "reference",
        "fastvae": importlib.metadata.version("fastvae"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
    }


def flop_rate(size: int = 1024) -> float:
    """Measure the FLOP/s of a float32 matrix product of `size` cubed, the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return 2.0 * size**3 / _best(lambda: torch.mm(a, b, out=out))


def copy_rate(size: float) -> float:
    """Measure the bytes/s, reads and writes counted, of a copy that moves `size` bytes, the best of several.

    What fits a cache is copied at that cache's rate: the limit of a small case is not that of main memory.
    """
    source = torch.randn(max(int(size) // 8, 1))
    target = torch.empty_like(source)
    return 8.0 * source.numel() / _best(lambda: target.copy_(source))


def _best(call: Any) -> float:
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    repeats = max(1, int(2e-3 / max(time.perf_counter() - start, 1e-7)))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"

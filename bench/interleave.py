"""Times several ways of computing the same thing in turns, so that the machine's moods fall on all of them alike.

A case is checked before it is timed: a contender that returns a wrong result stops the run.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = "fastvae"
PRODUCTS = "its products alone"  # no peer but the part of a case that no kernel of ours replaces
_SAMPLE_SECONDS = 2e-3  # a sample repeats its call until it lasts this long, far above the clock's grain


class WrongResultError(Exception):
    """A contender computed something else than the definition."""


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    Args:
        family: name of the op family.
        name: what and how large.
        direction: "forward" (without gradient recording) or "forward+backward".
        contenders: how it is computed, by name; `OURS` is one of them.
        check: raises `WrongResultError` unless the contender of the given name computes the definition.
        flops: additions and multiplications no implementation of the definition can avoid.
        bytes: memory traffic that none can avoid: each input read once, each output written once.
    """

    family: str
    name: str
    direction: str
    contenders: dict[str, Callable[[], Any]]
    check: Callable[[str], None]
    flops: float = field(default=0.0, kw_only=True)
    bytes: float = field(default=0.0, kw_only=True)


def assert_close(contender: str, what: str, got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Raise `WrongResultError` unless `got` is `expected` up to `tolerance` of its largest element."""
    if got.shape != expected.shape:
        raise WrongResultError(f"{contender}: {what} has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    error = (got.double() - expected.double()).abs().max().item()
    bound = tolerance * expected.abs().max().item()
    if not error <= bound:  # in this order NaN is wrong
        raise WrongResultError(f"{contender}: {what} is off by {error:.3g}, more than {bound:.3g}")


def interleaved_times(
    contenders: dict[str, Callable[[], Any]], seconds: float, least: int = 5, most: int = 400
) -> dict[str, list[float]]:
    """Call the contenders in turns.

    Args:
        contenders: calls by name.
        seconds: time to spend, within the bounds on the number of rounds.
        least, most: fewest and most rounds; 3 are enough where a round takes over a second.

    Returns:
        Seconds a call, one number a round for each contender.
    """
    repeats = {}
    for name, call in contenders.items():
        for _ in range(2):
            elapsed = _time(call, 1)
            if elapsed > 1:  # what a second call would warm, this one has
                break
        else:
            elapsed = _time(call, 1)
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(elapsed, 1e-9)))
    start = time.perf_counter()
    for name, call in contenders.items():
        _time(call, repeats[name])
    elapsed = time.perf_counter() - start
    rounds = max(least if elapsed < 1 else 3, min(most, int(seconds / elapsed)))
    names, times = list(contenders), {name: [] for name in contenders}
    for r in range(rounds):
        # Each follows another in turn: what a call leaves in the caches helps or hurts nobody in particular.
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(_time(contenders[name], repeats[name]))
    return times


def _time(call: Callable[[], Any], repeats: int) -> float:
    gc.collect(0)
    gc.disable()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed / repeats


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most memory that torch's CPU allocator held for `call`, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result  # kept until here: what a call returns belongs to its peak
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def run(case: Case, *, seconds: float, flop_rate: float, copy_rate: float) -> list[dict[str, Any]]:
    """Check a case, time it, and return one row for each contender.

    Args:
        case: what to run.
        seconds: time to spend on timing.
        flop_rate: FLOP/s that a large matrix product reaches here.
        copy_rate: bytes/s that a copy of this case's size reaches here.

    Raises:
        WrongResultError: a contender computes something else.
    """
    for name in case.contenders:
        case.check(name)
    times = interleaved_times(case.contenders, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    limit = max(case.flops / flop_rate, case.bytes / copy_rate)
    rows = []
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        rows.append(
            {
                "family": case.family,
                "case": case.name,
                "direction": case.direction,
                "contender": name,
                "median_ms": _rounded(1e3 * median[name]),
                "quartile1_ms": _rounded(1e3 * low),
                "quartile3_ms": _rounded(1e3 * high),
                "times_ours": _rounded(median[name] / median[OURS]),
                "share_of_limit": _rounded(limit / median[name]),
                "peak_mib": _rounded(peak_bytes(case.contenders[name]) / 2**20),
                "rounds": len(values),
            }
        )
    return rows


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")

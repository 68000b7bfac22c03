"""The same cases under pytest-benchmark: against a saved run of ours, or side by side.

pytest bench                                           check every contender, time nothing
pytest bench -k fastvae --benchmark-enable --benchmark-autosave
pytest bench -k fastvae --benchmark-enable --benchmark-compare --benchmark-compare-fail=median:20%
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import FAMILIES
from bench.interleave import Case

torch.set_num_threads(2)


def _all_cases() -> Iterator[Any]:
    for family in FAMILIES:
        for case in importlib.import_module(f"bench.{family}").cases():
            for contender in case.contenders:
                label = f"{family}: {case.name}, {case.direction}"
                yield pytest.param(case, contender, id=f"{label}-{contender}")


@pytest.mark.parametrize(("case", "contender"), [*_all_cases()])
def test_speed(case: Case, contender: str, benchmark: Any) -> None:
    case.check(contender)
    benchmark.group = f"{case.family}: {case.name}, {case.direction}"
    benchmark.extra_info["contender"] = contender
    benchmark(case.contenders[contender])

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import gaussian, interleave
from bench.interleave import OURS, Case, WrongResultError, assert_close, interleaved_times, peak_bytes


@pytest.fixture(params=["forward", "forward+backward"])
def case(request: pytest.FixtureRequest) -> Case:
    case = next(case for case in gaussian.cases() if case.direction == request.param)
    del case.contenders["torch.compile"]  # takes its time to compile
    return case


def test_a_case_is_checked_and_measured(case: Case) -> None:
    rows = interleave.run(case, seconds=0.0, flop_rate=1e10, copy_rate=1e10)
    assert [row["contender"] for row in rows] == [OURS, "eager"]
    assert rows[0]["times_ours"] == 1
    for row in rows:
        assert 0 < row["quartile1_ms"] <= row["median_ms"] <= row["quartile3_ms"]
        assert row["share_of_limit"] == pytest.approx(case.bytes / 1e7 / row["median_ms"], rel=1e-2)


@pytest.mark.parametrize("contender", [OURS, "eager"])
def test_a_wrong_result_is_not_timed(case: Case, contender: str) -> None:
    timed = []

    def spoilt(call: Callable[[], Any]) -> Callable[[], Any]:
        def spoilt_call() -> Any:
            timed.append(call)
            *results, last = call()
            return *results, last * 1.01

        return spoilt_call

    case.contenders[contender] = spoilt(case.contenders[contender])
    with pytest.raises(WrongResultError, match=contender):
        interleave.run(case, seconds=0.0, flop_rate=1e10, copy_rate=1e10)
    assert len(timed) == 1


def test_nan_and_another_shape_are_wrong() -> None:
    expected = torch.ones(3)
    assert_close("x", "y", expected + 1e-5, expected)
    for wrong in (torch.tensor([1, float("nan"), 1]), expected + 1e-3, torch.ones(3, 1)):
        with pytest.raises(WrongResultError, match="x: y"):
            assert_close("x", "y", wrong, expected)


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(interleave, "_time", lambda call, repeats: timed.append(call()) or 1.0)
    times = interleaved_times({name: lambda name=name: name for name in "abc"}, 0.0, least=4)
    assert times == {name: [1.0] * 4 for name in "abc"}
    assert "".join(timed[-12:]) == "abc" + "bca" + "cab" + "abc"


def test_peak_counts_what_is_held_at_once() -> None:
    mib = 2**20

    def call() -> tuple[torch.Tensor, ...]:
        first = torch.empty(mib, dtype=torch.uint8)
        second = torch.empty(2 * mib, dtype=torch.uint8)
        del first
        third = torch.empty(mib // 2, dtype=torch.uint8)
        return second, third

    assert peak_bytes(call) == 3 * mib

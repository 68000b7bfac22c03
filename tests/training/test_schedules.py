import math
import pickle

import pytest

from fastvae.training.schedules import (
    SCHEDULES,
    ConstantSchedule,
    CyclicalSchedule,
    LinearSchedule,
    LogisticSchedule,
    make_schedule,
)


def test_constant():
    schedule = ConstantSchedule(0.3)
    assert [schedule(step) for step in (0, 1, 10**9)] == [0.3, 0.3, 0.3]


def test_linear_goes_from_start_to_end_and_stays():
    schedule = LinearSchedule(start=0.1, end=1.0, steps=10)
    assert schedule(0) == 0.1
    assert schedule(5) == pytest.approx(0.55)
    assert schedule(10) == schedule(11) == schedule(10**9) == 1.0


def test_linear_may_fall():
    assert LinearSchedule(start=1.0, end=0.2, steps=4)(2) == pytest.approx(0.6)


def test_logistic_has_bowman_values():
    schedule = LogisticSchedule(k=0.0025, x0=2500)
    assert schedule(2500) == 0.5
    for step in (0, 1000, 2600, 5000, 10_000):
        assert schedule(step) == pytest.approx(1 / (1 + math.exp(-0.0025 * (step - 2500))), rel=1e-12)


def test_logistic_does_not_overflow():
    schedule = LogisticSchedule(k=10.0, x0=1e6)
    assert schedule(0) == 0.0
    assert schedule(10**9) == 1.0


def test_cyclical_rises_rests_and_restarts():
    schedule = CyclicalSchedule(period=100, ratio=0.5)
    assert [schedule(step) for step in (0, 25, 50, 99)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert [schedule(step) for step in (100, 125, 1050)] == pytest.approx([0.0, 0.5, 1.0])


def test_cyclical_stays_at_end_after_its_cycles():
    schedule = CyclicalSchedule(period=10, ratio=1.0, cycles=2, start=0.2, end=0.8)
    assert schedule(10) == pytest.approx(0.2)
    assert schedule(15) == pytest.approx(0.5)
    assert schedule(20) == schedule(25) == 0.8


@pytest.mark.parametrize("name", SCHEDULES)
def test_named_schedules_survive_pickling(name):
    schedule = make_schedule(name)
    again = pickle.loads(pickle.dumps(schedule))
    assert [again(step) for step in range(0, 20_000, 777)] == [schedule(step) for step in range(0, 20_000, 777)]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sigmoid", {}, "name must be one of constant, linear, logistic, cyclical"),
        ("linear", {"slope": 1.0}, "slope"),
        ("linear", {"steps": 0}, "steps"),
        ("linear", {"start": -0.1}, "start"),
        ("logistic", {"k": 0.0}, "k must"),
        ("cyclical", {"ratio": 0.0}, "ratio"),
        ("cyclical", {"period": 0}, "period"),
        ("constant", {"weight": -1.0}, "weight"),
        ("constant", {"weight": float("nan")}, "weight"),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, **settings)

"""Schedules for the weight of the KL term: plain callables from a training step to a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class ConstantSchedule:
    """The same weight at every step.

    Args:
        weight: the weight, at least 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.weight >= 0, f"weight must be at least 0, got {self.weight}")

    def __call__(self, step: int) -> float:
        """Weight at a training step, counted from 0."""
        return self.weight


@dataclass(frozen=True)
class LinearSchedule:
    """A straight line from `start` at step 0 to `end` at step `steps`, flat afterwards.

    Args:
        start: weight at step 0.
        end: weight from step `steps` on.
        steps: length of the slope in training steps, at least 1.
    """

    start: float = 0.0
    end: float = 1.0
    steps: int = 10_000

    def __post_init__(self) -> None:
        _require(self.start >= 0, f"start must be at least 0, got {self.start}")
        _require(self.end >= 0, f"end must be at least 0, got {self.end}")
        _require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        """Weight at a training step, counted from 0."""
        return _between(self.start, self.end, step / self.steps)


@dataclass(frozen=True)
class LogisticSchedule:
    """The sigmoid 1 / (1 + exp(-k (step - x0))).

    Args:
        k: steepness, per step, above 0.
        x0: the step at which the weight is one half.

    Source: Bowman et al., Generating Sentences from a Continuous Space (2016), section 3.1.
    """

    k: float = 0.0025
    x0: float = 2500.0

    def __post_init__(self) -> None:
        _require(self.k > 0, f"k must be above 0, got {self.k}")

    def __call__(self, step: int) -> float:
        """Weight at a training step, counted from 0."""
        # The tanh form has no exponential that can overflow far from x0.
        return 0.5 * (1.0 + math.tanh(0.5 * self.k * (step - self.x0)))


@dataclass(frozen=True)
class CyclicalSchedule:
    """Repeated linear slopes, each followed by a plateau.

    Within a cycle of `period` steps the weight rises from `start` to `end` over the first `ratio` of
    it and stays at `end` for the rest.

    Args:
        period: length of a cycle in steps, at least 1.
        ratio: share of a cycle spent rising, in (0, 1].
        cycles: number of cycles, after which the weight stays at `end`; None repeats for ever.
        start: weight at the beginning of each cycle.
        end: weight on the plateau.

    Source: Fu et al., Cyclical Annealing Schedule (2019), equations 6 and 7.
    """

    period: int = 10_000
    ratio: float = 0.5
    cycles: int | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _require(self.period >= 1, f"period must be at least 1, got {self.period}")
        _require(0 < self.ratio <= 1, f"ratio must be in (0, 1], got {self.ratio}")
        _require(self.cycles is None or self.cycles >= 1, f"cycles must be at least 1, got {self.cycles}")
        _require(self.start >= 0, f"start must be at least 0, got {self.start}")
        _require(self.end >= 0, f"end must be at least 0, got {self.end}")

    def __call__(self, step: int) -> float:
        """Weight at a training step, counted from 0."""
        if self.cycles is not None and step >= self.cycles * self.period:
            return self.end
        return _between(self.start, self.end, step % self.period / self.period / self.ratio)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "logistic": LogisticSchedule,
    "cyclical": CyclicalSchedule,
}


def make_schedule(name: str, **settings: float | int | None) -> Schedule:
    """Build a schedule from its name, as a configuration file gives it.

    Args:
        name: "constant", "linear", "logistic" or "cyclical".
        settings: arguments of the schedule of that name.

    Returns:
        A callable from the training step to the weight of the KL term.

    Raises:
        ValueError: for an unknown name, an unknown setting, or a setting out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name must be one of {', '.join(SCHEDULES)}, got {name!r}")
    try:
        return SCHEDULES[name](**settings)
    except TypeError as error:
        raise ValueError(f"settings of the {name} schedule: {error}") from error


def _between(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * min(max(fraction, 0.0), 1.0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

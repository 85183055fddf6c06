"""Schedules: when a rule's sparsity changes, and to what. Every kind becomes a timetable of (step, sparsity)."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsetrain.config.sparsity import Constant, Cubic, Geometric, Schedule, SparsityRule, Stepwise


@dataclass(frozen=True)
class Timetable:
    """Sparsity as a step function of time.

    `steps[i]` is the number of optimizer steps after which `sparsities[i]` begins to hold; both only grow, but that a
    dense tail ends in 0. Before the first entry nothing is zero.
    """

    steps: tuple[int, ...]
    sparsities: tuple[float, ...]

    def sparsity_after(self, step: int) -> float:
        """Sparsity that holds once `step` optimizer steps are done."""
        at = bisect_right(self.steps, step)
        return self.sparsities[at - 1] if at else 0.0

    def changes_after(self, step: int) -> bool:
        """Whether a new sparsity is due right after this many steps."""
        at = bisect_right(self.steps, step)
        return at > 0 and self.steps[at - 1] == step

    def densities(self, total_steps: int) -> NDArray[np.float64]:
        """Density during each of the first `total_steps` steps: [total_steps]."""
        at = np.searchsorted(self.steps, np.arange(total_steps), side="right")
        return 1.0 - np.array([0.0, *self.sparsities])[at]


def anchors(schedule: Schedule) -> tuple[float, ...]:
    """The fractions of training compute that a schedule names, in order."""
    match schedule:
        case Constant():
            return ()
        case Stepwise(steps=steps):
            return tuple(fraction for fraction, _ in steps)
        case Cubic(start=start, end=end) | Geometric(start=start, end=end):
            return (start, end)


def changes(rule: SparsityRule, at: Sequence[float]) -> list[tuple[float, float]]:
    """All (step, sparsity) of a rule whose `anchors` fall on the steps `at`.

    Inside a window masks are updated at its start, every `every_steps` after that, and at its end. Cubic: S + (s0 −
    S)(1 − u)³ with u from 0 to 1 (arXiv 1710.01878). Geometric: 1 − (1 − S)^((k+1)/n) at update k of n (2501.12486).
    """
    schedule, final = rule.schedule, rule.sparsity
    match schedule:
        case Constant():
            return [(0.0, final)]
        case Stepwise(steps=steps):
            return [(step, level) for step, (_, level) in zip(at, steps, strict=True)]
        case Cubic(every_steps=every, initial=initial):
            start, end = at
            times = _updates(start, end, every)
            return [(t, final + (initial - final) * (1 - _progress(t, start, end)) ** 3) for t in times]
        case Geometric(every_steps=every):
            times = _updates(at[0], at[1], every)
            return [(t, 1 - (1 - final) ** ((k + 1) / len(times))) for k, t in enumerate(times)]


def timetable(rule: SparsityRule, at: Sequence[int]) -> Timetable:
    """A rule's timetable when its window starts and ends after the steps `at` (its levels', when it is stepwise).

    A short run can put two changes on one step: the last, the highest sparsity, holds.
    """
    by_step = {int(step): level for step, level in changes(rule, at)}
    return Timetable(tuple(by_step), tuple(by_step.values()))


def _updates(start: float, end: float, every: int) -> list[float]:
    inside = max(0, int(-(-(end - start) // every)))
    return [*(start + k * every for k in range(inside)), end]


def _progress(step: float, start: float, end: float) -> float:
    return (step - start) / (end - start) if end > start else 1.0

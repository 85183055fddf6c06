import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.sparsity.schedules import Timetable, anchors, timetable


def rule(sparsity: float, **schedule: object) -> SparsityRule:
    method = "static" if schedule["kind"] == "constant" else "prune"
    return SparsityRule(params="*", method=method, sparsity=sparsity, schedule=schedule)


@pytest.mark.parametrize(
    ("sparsity", "end", "total", "density"),
    [(0.2, 8100, 11200, 0.8919), (0.4, 8875, 13050, 0.7651)],
    ids=["S20", "S40"],
)
def test_average_density_of_the_released_average_parameter_runs(
    sparsity: float, end: int, total: int, density: float
) -> None:
    """arXiv 2501.12486, start 2500, an update every 100 steps."""
    table = timetable(rule(sparsity, kind="geometric", every_steps=100), (2500, end))
    assert table.densities(total).mean() == pytest.approx(density, abs=0.002)
    cubic = timetable(rule(sparsity, kind="cubic", every_steps=100), (2500, end))
    assert cubic.densities(total).mean() < density - 0.02  # the test can tell the schedules apart


def test_geometric_removes_the_same_share_at_every_update() -> None:
    table = timetable(rule(0.75, kind="geometric", every_steps=10), (20, 50))
    assert table.steps == (20, 30, 40, 50)
    density = 1 - np.array([0.0, *table.sparsities])
    assert density[1:] / density[:-1] == pytest.approx([0.25**0.25] * 4)
    assert density[-1] == 0.25


def test_cubic_goes_from_initial_to_final_with_a_last_update_at_the_end() -> None:
    table = timetable(rule(0.9, kind="cubic", every_steps=4, initial=0.1), (10, 20))
    assert table.steps == (10, 14, 18, 20)
    assert table.sparsities == pytest.approx([0.1, 0.9 - 0.8 * 0.6**3, 0.9 - 0.8 * 0.2**3, 0.9])


def test_a_window_that_shrinks_to_one_step_prunes_at_once() -> None:
    for kind in ("cubic", "geometric"):
        assert timetable(rule(0.5, kind=kind), (3, 3)) == Timetable((3,), (0.5,))


def test_stepwise_levels_on_one_step_leave_the_last() -> None:
    steps = rule(0.5, kind="stepwise", steps=[(0.1, 0.2), (0.4, 0.3), (0.5, 0.5)])
    assert anchors(steps.schedule) == (0.1, 0.4, 0.5)
    assert timetable(steps, (1, 4, 4)) == Timetable((1, 4), (0.2, 0.5))


def test_constant_holds_from_the_start() -> None:
    table = timetable(rule(0.75, kind="constant"), ())
    assert table == Timetable((0,), (0.75,))
    assert table.densities(3).tolist() == [0.25] * 3


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 25), st.sampled_from(["cubic", "geometric"]))
def test_sparsity_only_grows_and_ends_exactly_at_the_target(start: int, length: int, every: int, kind: str) -> None:
    table = timetable(rule(0.75, kind=kind, every_steps=every), (start, start + length))
    assert list(table.steps) == sorted(set(table.steps))
    assert list(table.sparsities) == sorted(table.sparsities)
    assert (table.steps[0], table.steps[-1], table.sparsities[-1]) == (start, start + length, 0.75)
    assert len(table.steps) == math.ceil(length / every) + 1
    densities = table.densities(200)
    for step in range(200):  # the density during step t is what holds after t steps
        assert densities[step] == 1 - table.sparsity_after(step)
        assert table.changes_after(step) == (step in table.steps)

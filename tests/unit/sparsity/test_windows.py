import math

import numpy as np
import pytest
import torch
from torch import nn

from sparsetrain.config.sparsity import SparsityRule
from sparsetrain.errors import ConfigError
from sparsetrain.sparsity import Parameter, StepCosts, match_rules, plan_timetables, planned_densities
from sparsetrain.sparsity.matching import describe_parameters

WEIGHTS = [Parameter("a.weight", (64, 64), False), Parameter("b.weight", (64, 256), False)]


def prune(params: str, sparsity: float, **schedule: object) -> SparsityRule:
    return SparsityRule(params=params, method="prune", sparsity=sparsity, schedule=schedule)


def closed_form(sparsity: float) -> float:
    g = sparsity / -math.log(1 - sparsity)
    return 1 / (0.25 + 0.25 / (1 - sparsity) + 0.5 / g)


@pytest.mark.parametrize(("sparsity", "cost"), [(0.2, 0.8925), (0.4, 0.7662), (0.75, 0.460)])
def test_one_geometric_rule_over_all_compute_has_its_closed_form(sparsity: float, cost: float) -> None:
    rules = [prune("*", sparsity, kind="geometric", every_steps=1)]
    total = 20_000
    (table,) = plan_timetables(rules, match_rules(rules, WEIGHTS), total_steps=total)
    rho = closed_form(sparsity)
    assert rho == pytest.approx(cost, abs=5e-4)
    assert table.steps[0] == pytest.approx(0.25 * rho * total, abs=2)
    assert table.steps[-1] == pytest.approx((1 - 0.25 * rho / (1 - sparsity)) * total, abs=2)
    assert planned_densities(rules, WEIGHTS, total_steps=total).mean() == pytest.approx(rho, abs=1e-4)


RAMP = [min(step // 100 + 1, 8) * 64 for step in range(3000)]


@pytest.mark.parametrize("tokens", [512, RAMP], ids=["constant batch", "batch ramp"])
@pytest.mark.parametrize("every", [1, 50, 700])
def test_windows_cover_the_asked_share_of_compute(tokens: int | list[int], every: int) -> None:
    """Three rules that move each other's windows; the compute is added up here step by step."""
    rules = [
        prune("a*", 0.9, kind="geometric", every_steps=every),
        prune("b*", 0.6, kind="cubic", every_steps=every, start=0.1, end=0.9),
        prune("c*", 0.5, kind="stepwise", steps=[(0.3, 0.2), (0.6, 0.5)]),
    ]
    weights = [*WEIGHTS, Parameter("c.weight", (32, 32), False)]
    flops = {"a.weight": 4096.0, "b.weight": 16384.0, "c.weight": 8000.0}
    costs = StepCosts(tokens, fixed_flops_per_token=5000.0, flops_per_token=flops)
    tables = plan_timetables(rules, match_rules(rules, weights), total_steps=3000, costs=costs)
    spent = [0.0]
    for step in range(3000):
        rate = 5000.0
        for table, dense in zip(tables, flops.values(), strict=True):
            rate += dense * (1 - table.sparsity_after(step))
        spent.append(spent[-1] + rate * (tokens if isinstance(tokens, int) else tokens[step]))
    one_step = max(np.diff(spent)) / spent[-1]
    share = [[spent[step] / spent[-1] for step in table.steps] for table in tables]
    assert (share[0][0], share[0][-1]) == pytest.approx((0.25, 0.75), abs=1.5 * one_step)
    assert (share[1][0], share[1][-1]) == pytest.approx((0.1, 0.9), abs=1.5 * one_step)
    assert share[2] == pytest.approx([0.3, 0.6], abs=1.5 * one_step)


@pytest.mark.parametrize("kind", ["geometric", "cubic"])
@pytest.mark.parametrize("sparsity", [0.95, 0.99])
def test_windows_settle_where_most_of_the_compute_lies_before_the_pruning(kind: str, sparsity: float) -> None:
    rules = [prune("*", sparsity, kind=kind, every_steps=1)]
    spent = planned_densities(rules, WEIGHTS, total_steps=3000)[0].cumsum()
    (table,) = plan_timetables(rules, match_rules(rules, WEIGHTS), total_steps=3000)
    share = [spent[step - 1] / spent[-1] for step in (table.steps[0], table.steps[-1])]
    assert share == pytest.approx([0.25, 0.75], abs=1.5 / spent[-1])


def test_what_never_gets_sparse_pulls_the_window_towards_equal_steps() -> None:
    rules = [prune("*", 0.75, kind="geometric", every_steps=10)]
    costs = StepCosts(fixed_flops_per_token=1e9, flops_per_token={"a.weight": 1.0, "b.weight": 1.0})
    (table,) = plan_timetables(rules, match_rules(rules, WEIGHTS), total_steps=1000, costs=costs)
    assert (table.steps[0], table.steps[-1]) == (250, 750)


def test_erk_and_masks_left_by_a_phase_before_enter_the_plan() -> None:
    shapes = [Parameter("a", (4, 8), False), Parameter("b", (64, 64), False)]
    cost = StepCosts(flops_per_token={"a": 1e6, "b": 1.0})  # all compute in the weight that ERK leaves dense
    rule = SparsityRule(params="*", method="prune", sparsity=0.9, distribution="erk", schedule={"kind": "geometric"})
    (table,) = plan_timetables([rule], match_rules([rule], shapes), total_steps=1000, costs=cost)
    assert table.steps[0] == pytest.approx(250, abs=1)
    even = SparsityRule(params="*", method="prune", sparsity=0.5, schedule={"kind": "geometric", "every_steps": 1})
    owned = match_rules([even], WEIGHTS)
    half = {"a.weight": 0.5, "b.weight": 0.5}
    (table,) = plan_timetables([even], owned, total_steps=1000, initial_densities=half)  # nothing left to prune
    assert (table.steps[0], table.steps[-1]) == (250, 750)


def test_costs_of_nothing_count_tokens() -> None:
    rules = [prune("*", 0.5, kind="geometric")]
    (table,) = plan_timetables(
        rules, match_rules(rules, WEIGHTS), total_steps=100, costs=StepCosts([1] * 50 + [3] * 50)
    )
    assert (table.steps[0], table.steps[-1]) == (50, 83)


def test_a_plan_needs_the_number_of_steps_and_costs_for_all_of_them() -> None:
    rules = [prune("*", 0.5, kind="geometric")]
    with pytest.raises(ConfigError, match="total_steps"):
        plan_timetables(rules, match_rules(rules, WEIGHTS), total_steps=None)
    with pytest.raises(ConfigError, match="3 entries for 10 steps"):
        plan_timetables(rules, match_rules(rules, WEIGHTS), total_steps=10, costs=StepCosts([1, 2, 3]))


def test_planning_works_on_the_meta_device_and_for_no_rules() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rules = [SparsityRule(params="0", method="static", sparsity=0.75)]
    assert planned_densities(rules, describe_parameters(model), total_steps=4).tolist() == [[0.25] * 4]
    assert planned_densities([], describe_parameters(model), total_steps=4).shape == (0, 4)

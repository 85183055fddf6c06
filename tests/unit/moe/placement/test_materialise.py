"""Sparse materialisation: limits kept, loads evened out with one spare slot, and the paper's own plans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import (
    LoadForecast,
    Placement,
    Topology,
    dispatch,
    materialise,
    materialise_layers,
    own_evenly,
    scenario,
)
from sparsetrain.moe.placement.materialise import best_plan
from sparsetrain.moe.placement.relief import relieve
from sparsetrain.moe.placement.sweep import sweep
from tests.unit.moe.placement.problems import Problem, least_peak, problems, topologies


def placement_of(problem: Problem, method: str) -> Placement:
    return materialise(
        problem.load_E, problem.owner_E, problem.topology, slots=problem.slots, hot=problem.hot, method=method
    )


@pytest.mark.parametrize("method", ["best", "paper"])
@given(problem=problems())
def test_owners_keep_their_experts_and_replicas_stay_within_the_limits(method, problem):
    placement = placement_of(problem, method)
    np.testing.assert_array_equal(placement.owner_E, problem.owner_E)
    assert placement.holders_ED[np.arange(len(problem.owner_E)), problem.owner_E].all()
    replicas_D = [len(placement.replicas_of(device)) for device in range(problem.topology.num_devices)]
    assert max(replicas_D) <= problem.slots
    if problem.hot is not None:
        assert (placement.holders_ED.sum(axis=1) > 1).sum() <= problem.hot


@given(problems())
@settings(max_examples=60)
def test_replicas_never_make_the_fullest_device_fuller(problem):
    alone = least_peak(problem.load_E, Placement.of_owners(problem.owner_E, problem.topology.num_devices))
    assert least_peak(problem.load_E, placement_of(problem, "best")) <= alone + 1e-6


@pytest.mark.parametrize("plan_of", [sweep, relieve, best_plan])
@given(problem=problems())
@settings(max_examples=40)
def test_a_plan_is_at_least_as_even_as_it_says(plan_of, problem):
    load_LE, owners_LE = problem.load_E[None].astype(float), problem.owner_E[None]
    slots, hot = max(problem.slots, 1), len(problem.owner_E)
    more = {"variants": 4} if plan_of is relieve else {}
    plan = plan_of(load_LE, owners_LE, problem.topology, slots=slots, hot=hot, tolerance=0.02, **more)
    holders_ED = Placement.of_owners(problem.owner_E, problem.topology.num_devices).holders_ED
    assert not holders_ED[plan.expert_R, plan.device_R].any()
    assert np.bincount(plan.device_R, minlength=1).max() <= slots
    holders_ED[plan.expert_R, plan.device_R] = True
    mean = max(problem.load_E.sum(), 1) / problem.topology.num_devices
    assert least_peak(problem.load_E, Placement(problem.owner_E, holders_ED)) / mean <= plan.peak_L[0] + 1e-6


@given(topologies(), st.integers(0, 2**32 - 1))
def test_one_spare_slot_evens_out_any_load_of_one_expert_a_device(topology, seed):
    """Walker's alias method: n columns of any height become even when each is topped up from one other."""
    num_devices = topology.num_devices
    load_E = np.random.default_rng(seed).pareto(1.0, num_devices)
    plan = sweep(load_E[None], np.arange(num_devices)[None], topology, slots=1, hot=num_devices, tolerance=0.02)
    assert plan.peak_L[0] <= 1.02 + 1e-6


@given(problems(), st.sampled_from([0.5, 2.0, 1024.0]))
def test_a_plan_depends_on_shares_alone(problem, scale):
    limits = {"slots": problem.slots, "hot": problem.hot}
    one = materialise(problem.load_E, problem.owner_E, problem.topology, **limits)
    assert one == materialise(scale * problem.load_E, problem.owner_E, problem.topology, **limits)


@pytest.mark.parametrize("method", ["best", "paper"])
def test_layers_planned_together_get_the_plans_that_they_get_alone(method):
    topology = Topology(8, 4)
    owners_LE = own_evenly(5, 20, 8)
    load_LE = np.random.default_rng(0).pareto(1.0, (5, 20))
    together = materialise_layers(load_LE, owners_LE, topology, slots=2, hot=6, method=method)
    alone = [
        materialise(load_E, owner_E, topology, slots=2, hot=6, method=method)
        for load_E, owner_E in zip(load_LE, owners_LE, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("name", ["L0", "L1", "L2", "L3", "L4"])
@pytest.mark.parametrize("seed", range(3))
def test_a_known_load_is_even_with_one_spare_expert_a_device(name, seed):
    topology = Topology(8, 4)
    loads = scenario(name, 64, 8, seed=seed)
    counts_SE = loads.counts_SE(0, 16_384)
    placement = materialise(counts_SE.sum(axis=0), loads.owner_E, topology, slots=1)
    load_D = dispatch(counts_SE, placement, topology).load_D
    assert load_D.max() <= 1.05 * load_D.mean()


@pytest.mark.parametrize("name", ["L0", "L1", "L2", "L3", "L4"])
def test_a_load_forecast_from_five_steps_is_nearly_as_even(name):
    topology, forecast = Topology(8, 4), LoadForecast(5)
    loads = scenario(name, 64, 8, seed=7)
    for step in range(5):
        forecast.update(loads.counts_SE(step, 16_384).sum(axis=0)[None])
    placement = materialise_layers(forecast.mean_LE, loads.owner_E[None], topology, slots=1)[0]
    load_D = dispatch(loads.counts_SE(5, 16_384), placement, topology).load_D
    assert load_D.max() <= 1.08 * load_D.mean()


def test_an_even_load_needs_no_replica():
    loads = scenario("L0", 64, 8)
    placement = materialise(loads.counts_SE(0, 16_384).sum(axis=0), loads.owner_E, Topology(8, 4), slots=2)
    assert placement == Placement.of_owners(loads.owner_E, 8)


@pytest.mark.parametrize("method", ["best", "paper"])
@pytest.mark.parametrize("limits", [{"slots": 0}, {"slots": 1, "hot": 0}], ids=["no slots", "no hot experts"])
def test_without_slots_or_hot_experts_it_is_expert_parallelism(method, limits):
    owner_E = own_evenly(1, 6, 3)[0]
    placement = materialise([9, 0, 0, 0, 0, 0], owner_E, Topology(3, 3), method=method, **limits)
    assert placement == Placement.of_owners(owner_E, 3)


def test_all_load_on_one_expert_brings_it_to_every_device():
    placement = materialise([0, 0, 100, 0], np.arange(4), Topology(4, 2), slots=1)
    assert placement.holders_ED.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [True, True, True, True],
        [False, False, False, True],
    ]


def test_replicas_go_to_nodes_that_lack_the_expert():
    """Expert 0 has 2.4 shares of the load; both other nodes get it before its own node has it twice."""
    load_E = np.array([40, 10, 10, 10, 15, 15])
    placement = materialise(load_E, np.arange(6), Topology(6, 2), slots=1)
    holding_nodes = Topology(6, 2).node_D[placement.holders_ED[0]]
    assert set(holding_nodes) == {0, 1, 2}


def test_the_paper_puts_few_hot_experts_everywhere():
    placement = materialise([5, 9, 1, 7], np.arange(4), Topology(4, 2), slots=3, hot=2, method="paper")
    assert placement.holders_ED.sum(axis=1).tolist() == [1, 4, 1, 4]


def test_the_paper_deals_slots_in_proportion_and_spreads_them_over_nodes():
    """Four slots for loads 6 and 2: three replicas and one; the first of each in the node that lacks the expert."""
    owner_E = np.array([0, 1, 2, 3])
    placement = materialise([6, 2, 1, 1], owner_E, Topology(4, 2), slots=1, hot=2, method="paper")
    assert placement.replicas_of(0).tolist() == [1]
    assert [placement.replicas_of(device).tolist() for device in (1, 2, 3)] == [[0], [0], [0]]


def test_the_paper_takes_the_least_loaded_device_of_a_node():
    owner_E = np.array([0, 2, 3, 1])
    placement = materialise([10, 5, 2, 3], owner_E, Topology(4, 2), slots=1, hot=1, method="paper")
    assert placement.num_replicas == 3  # no more than there are other devices
    two_hot = materialise([10, 5, 2, 3], owner_E, Topology(4, 2), slots=1, hot=2, method="paper")
    assert two_hot.replicas_of(3).tolist() == [0]


@pytest.mark.parametrize(("name", "anchor"), [("L1", 1.18), ("L2", 1.34), ("L3", 1.41)])
def test_the_papers_planner_and_dispatch_reach_their_known_balance(name, anchor):
    """64 experts, 8 devices in 2 nodes, m = 1, t = 4: it is no straw man."""
    topology = Topology(8, 4)
    peaks = []
    for seed in range(60):
        loads = scenario(name, 64, 8, seed=seed)
        counts_SE = loads.counts_SE(0, 16_384)
        placement = materialise(counts_SE.sum(axis=0), loads.owner_E, topology, slots=1, hot=4, method="paper")
        load_D = dispatch(counts_SE, placement, topology, method="paper").load_D
        peaks.append(load_D.max() / load_D.mean())
    assert np.median(peaks) == pytest.approx(anchor, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"load_E": [1.0, 2.0, 3.0]}, r"must both be \[L, E\]", id="shape"),
        pytest.param({"load_E": [1.0, -2.0]}, "negative or not a finite", id="negative"),
        pytest.param({"load_E": [1.0, np.nan]}, "negative or not a finite", id="not a number"),
        pytest.param({"owner_E": np.array([0, 2])}, "devices 0 to 1", id="owner"),
        pytest.param({"slots": -1}, "must not be negative", id="slots"),
        pytest.param({"hot": -1}, "must not be negative", id="hot"),
        pytest.param({"method": "random"}, "'random' is unknown", id="method"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    good = {"load_E": [1.0, 2.0], "owner_E": np.array([0, 1]), "topology": Topology(2, 1), "slots": 1}
    with pytest.raises(PlacementError, match=message):
        materialise(**(good | arguments))

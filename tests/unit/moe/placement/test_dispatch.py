"""Dispatch: every row delivered once, the paper's rules, and the least possible maximum."""

import numpy as np
import pytest
from hypothesis import given, settings

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import Dispatch, Placement, Topology, dispatch, materialise, own_evenly, scenario
from tests.unit.moe.placement.problems import Problem, least_crossing, least_peak, placed


def deliveries(problem: Problem, placement: Placement) -> dict[str, Dispatch]:
    return {
        method: dispatch(problem.counts_SE, placement, problem.topology, method=method)
        for method in ("capacity", "paper")
    }


@given(placed())
def test_every_row_is_delivered_once_and_only_to_holders(case):
    problem, placement = case
    for plan in deliveries(problem, placement).values():
        devices = range(problem.topology.num_devices)
        sent_SED = np.stack([plan.sent_by(source) for source in devices])
        assert sent_SED.min() >= 0
        np.testing.assert_array_equal(sent_SED.sum(axis=2), problem.counts_SE)
        assert (sent_SED.sum(axis=0)[~placement.holders_ED] == 0).all()
        for device in devices:
            np.testing.assert_array_equal(plan.received_by(device), sent_SED[:, :, device])
        np.testing.assert_array_equal(plan.load_D, sent_SED.sum(axis=(0, 1)))
        node_D = problem.topology.node_D
        assert plan.crossing == sent_SED.sum(axis=1)[node_D[:, None] != node_D].sum()


@given(placed())
def test_the_papers_dispatch_stays_local_then_in_the_node_and_splits_evenly(case):
    problem, placement = case
    plan = deliveries(problem, placement)["paper"]
    node_D, holders_ED = problem.topology.node_D, placement.holders_ED
    for source in range(problem.topology.num_devices):
        sent_ED = plan.sent_by(source)
        for expert in range(placement.num_experts):
            in_node_D = holders_ED[expert] & (node_D == node_D[source])
            if holders_ED[expert, source]:
                targets_D = np.arange(len(node_D)) == source
            else:
                targets_D = in_node_D if in_node_D.any() else holders_ED[expert]
            assert (sent_ED[expert, ~targets_D] == 0).all()
            assert np.ptp(sent_ED[expert, targets_D]) <= 1


def test_what_does_not_divide_evenly_goes_to_another_holder_for_every_source():
    everywhere = Placement(np.array([0]), np.array([[True, True, False, False]]))
    counts_SE = np.array([[0], [0], [1], [1]])
    plan = dispatch(counts_SE, everywhere, Topology(4, 1), method="paper")
    assert plan.load_D.tolist() == [1, 1, 0, 0]


@given(placed())
@settings(max_examples=60)
def test_the_fullest_device_has_the_least_possible_maximum(case):
    """Against a linear program: whole rows cost at most the rounding up."""
    problem, placement = case
    plan = dispatch(problem.counts_SE, placement, problem.topology, cross_node_cost=0.0)
    assert plan.load_D.max() == np.ceil(round(least_peak(problem.load_E, placement), 6))


@given(placed())
@settings(max_examples=60)
def test_the_fullest_device_is_within_the_cost_of_a_crossing_or_the_least_possible(case):
    problem, placement = case
    plan = dispatch(problem.counts_SE, placement, problem.topology, cross_node_cost=0.3)
    allowed = np.ceil(1.3 * problem.load_E.sum() / problem.topology.num_devices)
    assert plan.load_D.max() <= max(allowed, np.ceil(round(least_peak(problem.load_E, placement), 6)))


@given(placed())
def test_a_balanced_split_is_never_fuller_than_the_papers_or_than_owners_alone(case):
    problem, placement = case
    plans = deliveries(problem, placement)
    alone_D = np.bincount(problem.owner_E, problem.load_E, problem.topology.num_devices)
    assert plans["capacity"].load_D.max() <= max(
        min(plans["paper"].load_D.max(), alone_D.max()), np.ceil(1.02 * problem.load_E.sum() / len(alone_D))
    )


@given(placed())
def test_sources_are_matched_locally_first_then_in_the_node(case):
    """Given what each holder takes, no more rows leave their device, or their node, than must."""
    problem, placement = case
    plan = deliveries(problem, placement)["capacity"]
    taken_P, counts_SE = plan.deliveries.rows_P, problem.counts_SE
    local_P = [plan.sent_by(device)[expert, device] for expert, device in np.argwhere(placement.holders_ED)]
    np.testing.assert_array_equal(local_P, np.minimum(taken_P, counts_SE[placement.device_P, placement.expert_P]))
    taken_DE = np.zeros_like(counts_SE)
    taken_DE[placement.device_P, placement.expert_P] = taken_P
    of_node_NE, in_node_NE = (
        np.add.reduceat(rows, problem.topology.first_of_node_N, axis=0) for rows in (counts_SE, taken_DE)
    )
    assert plan.crossing == np.maximum(of_node_NE - in_node_NE, 0).sum()


@pytest.mark.parametrize("name", ["L1", "L2", "L3", "L4"])
def test_crossings_are_close_to_the_fewest_that_balance_allows(name):
    """Within 5 % of the linear program's optimum at the capacity that was reached."""
    topology = Topology(16, 4)
    loads = scenario(name, 64, 16, seed=3)
    counts_SE = loads.counts_SE(0, 2048)
    placement = materialise(counts_SE.sum(axis=0), loads.owner_E, topology, slots=1)
    plan = dispatch(counts_SE, placement, topology)
    fewest = least_crossing(counts_SE, placement, topology, int(plan.load_D.max()))
    assert fewest <= plan.crossing + 1e-6
    assert plan.crossing <= 1.05 * fewest


def test_a_crossing_is_spared_while_it_costs_less_than_the_load_it_would_even_out():
    """Both experts everywhere, all rows in node 0: balance needs half of them to cross, a high cost none."""
    topology = Topology(4, 2)
    everywhere = Placement(np.array([0, 2]), np.ones((2, 4), dtype=bool))
    counts_SE = np.array([[50, 50], [50, 50], [0, 0], [0, 0]])
    even = dispatch(counts_SE, everywhere, topology, cross_node_cost=0.0)
    assert even.load_D.tolist() == [50, 50, 50, 50]
    assert even.crossing == 100
    near = dispatch(counts_SE, everywhere, topology, cross_node_cost=1.0)
    assert near.load_D.tolist() == [100, 100, 0, 0]
    assert near.crossing == 0


def test_rows_are_handed_on_along_a_chain_of_replicas():
    """Expert 0 is held by devices 0 and 1, expert 1 by 1 and 2: device 0 is relieved through device 1 alone."""
    chain = Placement(np.array([0, 1]), np.array([[True, True, False], [False, True, True]]))
    counts_SE = np.zeros((3, 2), dtype=np.int64)
    counts_SE[0] = [60, 30]
    plan = dispatch(counts_SE, chain, Topology(3, 3), cross_node_cost=0.0)
    assert plan.load_D.tolist() == [30, 30, 30]


def test_no_rows_at_all_are_dispatched_to_nobody():
    placement = Placement.of_owners(own_evenly(1, 4, 2)[0], 2)
    for method in ("capacity", "paper"):
        plan = dispatch(np.zeros((2, 4), dtype=np.int64), placement, Topology(2, 1), method=method)
        assert plan.load_D.tolist() == [0, 0]


def test_plans_that_differ_have_different_fingerprints():
    placement = Placement(np.array([0]), np.ones((1, 2), dtype=bool))
    one, other = (dispatch(np.array([[4], [rows]]), placement, Topology(2, 2)).fingerprint for rows in (4, 5))
    assert one != other


def test_a_mesh_that_does_not_fit_or_an_unknown_method_is_refused():
    placement = Placement.of_owners(np.array([0, 1]), 2)
    with pytest.raises(PlacementError, match="do not fit 3 devices"):
        dispatch(np.ones((3, 2), dtype=np.int64), placement, Topology(3, 1))
    with pytest.raises(PlacementError, match="expected counts of shape"):
        dispatch(np.ones((2, 3), dtype=np.int64), placement, Topology(2, 1))
    with pytest.raises(PlacementError, match="'even' is unknown"):
        dispatch(np.ones((2, 2), dtype=np.int64), placement, Topology(2, 1), method="even")

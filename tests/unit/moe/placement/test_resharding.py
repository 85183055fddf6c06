"""Resharding: devices keep their numbers of experts, few experts move, and what replicas cannot mend is mended."""

import numpy as np
import pytest
from hypothesis import given

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import Topology, dispatch, materialise, own_evenly, reshard_owners, scenario
from tests.unit.moe.placement.problems import Problem, problems


def layers_of(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Three layers that differ in load and owners."""
    load_LE = np.stack([np.roll(problem.load_E, layer) for layer in range(3)])
    return load_LE, np.stack([np.roll(problem.owner_E, layer) for layer in range(3)])


@pytest.mark.parametrize("method", ["best", "paper"])
@given(problem=problems())
def test_every_device_keeps_its_number_of_experts_over_all_layers(method, problem):
    load_LE, owners_LE = layers_of(problem)
    resharded_LE = reshard_owners(load_LE, owners_LE, problem.topology, hot=problem.hot, method=method)
    assert resharded_LE.shape == owners_LE.shape
    np.testing.assert_array_equal(
        np.bincount(resharded_LE.ravel(), minlength=problem.topology.num_devices),
        np.bincount(owners_LE.ravel(), minlength=problem.topology.num_devices),
    )


@given(problems())
def test_swaps_keep_a_devices_number_of_experts_in_every_layer(problem):
    load_LE, owners_LE = layers_of(problem)
    resharded_LE = reshard_owners(load_LE, owners_LE, problem.topology, slots=problem.slots, hot=problem.hot)
    np.testing.assert_array_equal(np.sort(resharded_LE, axis=1), np.sort(owners_LE, axis=1))


def test_idle_ranks_take_over_their_share():
    """L6: half of the ranks own nothing that is wanted; one spare slot helps little, new owners mend it."""
    topology, loads = Topology(8, 4), scenario("L6", 64, 8)
    counts_SE = loads.counts_SE(0, 16_384)
    load_E = counts_SE.sum(axis=0)

    def imbalance(owner_E: np.ndarray) -> float:
        load_D = dispatch(counts_SE, materialise(load_E, owner_E, topology, slots=1), topology).load_D
        return load_D.max() / load_D.mean()

    resharded_LE = reshard_owners(load_E[None], loads.owner_E[None], topology)
    assert imbalance(loads.owner_E) > 1.7
    assert imbalance(resharded_LE[0]) <= 1.05
    moved = (resharded_LE[0] != loads.owner_E).sum()
    assert 32 <= moved <= 36  # 16 of the wanted experts have to go, and as many come back


def test_owners_stay_where_replicas_suffice():
    loads = scenario("L4", 64, 8)
    owners_LE = loads.owner_E[None]
    load_LE = loads.counts_SE(0, 16_384).sum(axis=0)[None]
    np.testing.assert_array_equal(reshard_owners(load_LE, owners_LE, Topology(8, 4)), owners_LE)
    assert (reshard_owners(load_LE, owners_LE, Topology(8, 4), method="paper") != owners_LE).any()


def test_without_slots_owners_alone_even_the_load_out():
    load_E = np.array([4, 4, 1, 1, 1, 1])
    owner_E = np.array([0, 0, 1, 1, 2, 2])
    resharded_E = reshard_owners(load_E[None], owner_E[None], Topology(3, 3), slots=0)[0]
    assert np.bincount(resharded_E, load_E).max() == 5
    assert (resharded_E != owner_E).sum() == 2


def test_the_paper_assigns_the_rest_by_load_and_fills_up_with_the_hot():
    """By hand: one layer, t = 1; experts 1 to 3 by descending load to node 0, node 1, then the emptier node's slot."""
    resharded_E = reshard_owners([[9, 5, 4, 3]], np.array([[0, 1, 2, 3]]), Topology(4, 2), hot=1, method="paper")[0]
    # 5 -> device 0; node 1 is emptier: 4 -> device 2; then 3 -> device 3; the hot one takes the slot left.
    assert resharded_E.tolist() == [1, 0, 2, 3]


def test_an_unknown_method_or_a_negative_number_is_refused():
    with pytest.raises(PlacementError, match="'greedy' is unknown"):
        reshard_owners([[1]], np.array([[0]]), Topology(1, 1), method="greedy")
    with pytest.raises(PlacementError, match="must not be negative"):
        reshard_owners([[1]], own_evenly(1, 1, 1), Topology(1, 1), slots=-1)

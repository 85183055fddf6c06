"""Topologies, placements, and the owners of expert parallelism."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import Placement, Topology, own_evenly


def test_devices_stand_in_nodes_in_order_and_the_last_node_may_be_smaller():
    topology = Topology(num_devices=7, devices_per_node=3)
    assert topology.node_D.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert topology.num_nodes == 3
    assert topology.first_of_node_N.tolist() == [0, 3, 6]


@pytest.mark.parametrize("arguments", [(0, 1), (4, 0)])
def test_a_topology_needs_devices_and_nodes(arguments):
    with pytest.raises(PlacementError, match="must be at least 1"):
        Topology(*arguments)


def test_a_placement_says_who_owns_and_who_has_a_replica():
    holders_ED = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 1]], dtype=bool)
    placement = Placement(np.array([0, 1, 2]), holders_ED)
    assert placement.num_replicas == 2
    assert placement.replicas_of(0).tolist() == [2]
    assert placement.replicas_of(1).tolist() == [0]
    assert placement.owned_by(2).tolist() == [2]
    assert placement.expert_P.tolist() == [0, 0, 1, 2, 2]
    assert placement.device_P.tolist() == [0, 1, 1, 0, 2]


def test_equal_placements_are_equal_and_have_equal_fingerprints():
    one, same = (Placement.of_owners(np.array([0, 1, 1]), 2) for _ in range(2))
    other = Placement(np.array([0, 1, 1]), np.ones((3, 2), dtype=bool))
    assert one == same
    assert hash(one) == hash(same) == one.fingerprint
    assert one != other
    assert one.fingerprint != other.fingerprint
    assert 0 <= one.fingerprint < 2**63


def test_the_fingerprint_tells_owners_apart_that_hold_the_same():
    everywhere = np.ones((2, 2), dtype=bool)
    fingerprints = {Placement(np.array(owners), everywhere).fingerprint for owners in ([0, 1], [1, 0], [0, 0])}
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("owners", "holders", "message"),
    [
        pytest.param([0, 1], np.ones((3, 2), dtype=bool), "do not go with", id="shapes"),
        pytest.param([0, 2], np.ones((2, 2), dtype=bool), "outside devices 0 to 1", id="no such device"),
        pytest.param([0, 1], np.array([[True, False], [True, False]]), r"experts \[1\]", id="owner does not hold"),
    ],
)
def test_a_contradictory_placement_is_refused(owners, holders, message):
    with pytest.raises(PlacementError, match=message):
        Placement(np.array(owners), holders)


def test_experts_are_owned_in_blocks_when_they_divide_evenly():
    assert own_evenly(2, 8, 4).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2


def test_fewer_experts_than_devices_take_turns_and_stand_apart():
    assert own_evenly(3, 2, 6).tolist() == [[0, 3], [1, 4], [2, 5]]


@given(st.integers(1, 7), st.integers(1, 20), st.integers(1, 20))
def test_every_device_owns_its_share_of_all_layers_rounded(num_layers, num_experts, num_devices):
    owners_LE = own_evenly(num_layers, num_experts, num_devices)
    assert owners_LE.shape == (num_layers, num_experts)
    owned_D = np.bincount(owners_LE.ravel(), minlength=num_devices)
    assert set(owned_D) <= {num_layers * num_experts // num_devices, -(-num_layers * num_experts // num_devices)}
    for owner_E in owners_LE:
        in_layer_D = np.bincount(owner_E, minlength=num_devices)
        assert in_layer_D.max() - in_layer_D.min() <= 1
        assert (np.diff(owner_E) >= 0).all()
    if num_experts % num_devices == 0:
        np.testing.assert_array_equal(owners_LE[-1], np.arange(num_experts) * num_devices // num_experts)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_owning_needs_layers_experts_and_devices(arguments):
    with pytest.raises(PlacementError, match="must be at least 1"):
        own_evenly(*arguments)

"""Forecasts, costs and bytes: closed formulas against sums done by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import (
    CostModel,
    ExpertBytes,
    LoadForecast,
    Placement,
    Topology,
    check_slots,
    dispatch,
    fastest_placement,
    materialise,
    materialised_bytes,
    most_replicas,
    own_evenly,
    owned_bytes,
    received_bytes,
    returned_bytes,
    slots_to_try,
)
from sparsetrain.moe.placement.slots import fullest_rows

COSTS = CostModel(row_s=1e-6, expert_bytes=10_000, byte_s=1e-9, free_s=50e-6)


def test_a_forecast_is_the_mean_of_the_last_steps():
    forecast = LoadForecast(window=2)
    assert forecast.mean_LE is None
    for load, mean in (([[4, 0]], [[4, 0]]), ([[0, 2]], [[2, 1]]), ([[2, 2]], [[1, 2]])):
        forecast.update(load)
        np.testing.assert_array_equal(forecast.mean_LE, mean)


def test_a_forecast_does_not_follow_later_changes_of_what_it_was_given():
    forecast, load = LoadForecast(), np.array([[1.0, 2.0]])
    forecast.update(load)
    load[:] = 9
    np.testing.assert_array_equal(forecast.mean_LE, [[1, 2]])


def test_a_forecast_needs_a_window_and_loads_of_one_shape():
    with pytest.raises(PlacementError, match="forecast window is 0"):
        LoadForecast(0)
    forecast = LoadForecast()
    forecast.update([[1, 2]])
    with pytest.raises(PlacementError, match="shape"):
        forecast.update([[1, 2, 3]])


def test_experts_travel_for_free_while_attention_hides_them():
    assert COSTS.transfer_s == pytest.approx(20e-6)  # there and back
    assert COSTS.hot_experts(64) == 2  # 50 us hide two of them
    assert COSTS.hot_experts(1) == 1
    assert CostModel(1e-6, 10_000, 0.0, 0.0).hot_experts(64) == 64


def test_a_layer_waits_only_for_transfers_that_are_not_hidden():
    assert COSTS.layer_s(1000, 2) == pytest.approx(1000e-6)
    assert COSTS.layer_s(1000, 4) == pytest.approx(1030e-6)


def holders(*replicas: tuple[int, int]) -> Placement:
    """8 experts on 4 devices, with replicas (expert, device)."""
    owner_E = np.arange(8) // 2
    holders_ED = Placement.of_owners(owner_E, 4).holders_ED.copy()
    for expert, device in replicas:
        holders_ED[expert, device] = True
    return Placement(owner_E, holders_ED)


ROWS_E = np.array([800.0, 0, 400, 0, 200, 0, 200, 0])  # of 1600: the first device has twice the mean
ONE_SLOT, TWO_SLOTS = holders((0, 2), (0, 3)), holders((0, 2), (0, 3), (2, 3), (2, 2), (4, 3), (6, 2))


@pytest.mark.parametrize(
    ("free_s", "expected"),
    [
        pytest.param(50e-6, 1, id="one slot travels for free"),
        pytest.param(-1.0, 0, id="no slot pays for its transfers"),
        pytest.param(1.0, 1, id="more slots than are needed are not used"),
    ],
)
def test_slots_are_filled_while_they_pay(free_s, expected):
    alone = holders()
    cost = CostModel(1e-6, 10_000, 1e-9, free_s) if free_s >= 0 else CostModel(1e-6, 10_000, 1e-7, 0.0)
    found = fastest_placement(ROWS_E, alone, [ONE_SLOT, TWO_SLOTS], cost)
    assert found is [alone, ONE_SLOT, TWO_SLOTS][expected]
    even = np.full(8, 200.0)
    assert fastest_placement(even, alone, [ONE_SLOT, TWO_SLOTS], cost) is alone


def test_a_second_slot_is_filled_where_one_is_not_enough():
    owner_E, rows_E = np.array([0, 1, 2, 3]), np.array([600.0, 100, 700, 200])
    topology, cost = Topology(4, 4), CostModel(1e-6, 10_000, 1e-10, 0.0)
    tried = [materialise(rows_E, owner_E, topology, slots=slots) for slots in slots_to_try(2)]
    alone = Placement.of_owners(owner_E, 4)
    seconds = {}
    for at, placement in enumerate([alone, *tried]):
        counts_SE = np.tile(rows_E.astype(np.int64) // 4, (4, 1))
        rows = float(dispatch(counts_SE, placement, topology).load_D.max())
        seconds[at] = cost.layer_s(rows, most_replicas(placement))
    found = fastest_placement(rows_E, alone, tried, cost)
    assert found is [alone, *tried][min(seconds, key=lambda at: seconds[at])] is not alone


@pytest.mark.parametrize("num_devices", [4, 16])
@pytest.mark.parametrize("exponent", [0.5, 1.5])
def test_dispatching_comes_close_to_the_rows_that_slots_are_chosen_by(num_devices, exponent):
    topology, rows_E = (
        Topology(num_devices, 4),
        np.random.default_rng(5).permutation(1e6 / np.arange(1, 33) ** exponent),
    )
    owner_E = own_evenly(1, 32, num_devices)[0]
    placement = materialise(rows_E, owner_E, topology, slots=2)
    counts_SE = np.tile(np.rint(rows_E / num_devices).astype(np.int64), (num_devices, 1))
    rows = float(dispatch(counts_SE, placement, topology).load_D.max())
    assert fullest_rows(rows_E, placement) * (1 - 1e-3) <= rows <= 1.05 * fullest_rows(rows_E, placement)


def test_numbers_of_slots_to_try_are_few():
    assert [slots_to_try(slots) for slots in (0, 1, 2, 3, 9)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 9]]


def test_replicas_are_counted_on_the_device_that_has_most():
    assert most_replicas(holders()) == 0
    assert most_replicas(TWO_SLOTS) == 3
    assert most_replicas(TWO_SLOTS, ONE_SLOT) == 2
    assert most_replicas(ONE_SLOT, TWO_SLOTS) == 0


def test_re_planning_pays_when_it_gains_more_than_moving_the_weights():
    assert COSTS.pays(1000, 900, replicas=9)  # 100 us gained, 90 us moved
    assert not COSTS.pays(1000, 900, replicas=10)
    assert not COSTS.pays(1000, 1000, replicas=0)


def test_costs_are_not_negative():
    with pytest.raises(PlacementError, match="byte_s is -1"):
        CostModel(1.0, 1, -1, 0.0)


EXPERT = ExpertBytes(numel=1000)
HOLDERS = np.array([[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 1]], dtype=bool)
PLACEMENT = Placement(np.array([0, 1, 2, 2]), HOLDERS)


def test_bytes_of_an_expert_are_those_of_its_parts():
    assert EXPERT.owned == 12_000  # fp32 weight and two fp32 moments
    assert EXPERT.replica == EXPERT.replica_gradient == 2000


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 6))
def test_owned_experts_take_their_share_of_the_memory(num_layers, num_experts, num_devices):
    owners_LE = own_evenly(num_layers, num_experts, num_devices)
    owned_D = [owned_bytes(owners_LE, device, EXPERT) for device in range(num_devices)]
    assert sum(owned_D) == num_layers * num_experts * EXPERT.owned
    assert max(owned_D) - min(owned_D) <= EXPERT.owned


def test_replicas_are_received_and_their_gradients_returned():
    assert [received_bytes(PLACEMENT, device, EXPERT) for device in range(3)] == [2000, 2000, 2000]
    assert [returned_bytes(PLACEMENT, device, EXPERT) for device in range(3)] == [4000, 0, 2000]


@pytest.mark.parametrize(
    ("layers", "kept", "freed"),
    [
        pytest.param("", 0, 0, id="no layer"),
        pytest.param(".", 0, 0, id="no replica"),
        pytest.param("r", 4000, 4000, id="weights and gradients of one"),
        pytest.param("rr.r", 4 * 2000, 6000, id="neighbours"),
        pytest.param("r.r.r", 4 * 2000, 4000, id="no neighbours"),
        pytest.param("rrrrr", 6 * 2000, 6000, id="kept ones add up"),
    ],
)
def test_kept_replicas_add_up_over_layers_and_freed_ones_do_not(layers, kept, freed):
    alone = Placement.of_owners(PLACEMENT.owner_E, 3)
    placements = [PLACEMENT if layer == "r" else alone for layer in layers]
    assert materialised_bytes(placements, 0, EXPERT, freed=False) == kept
    assert materialised_bytes(placements, 0, EXPERT, freed=True) == freed


def test_gradients_in_fp32_weigh_more_than_weights_in_bf16():
    expert = ExpertBytes(numel=1000, gradient_itemsize=4)
    assert materialised_bytes([PLACEMENT] * 4, 0, expert, freed=True) == 2000 + 2 * 4000
    assert materialised_bytes([PLACEMENT] * 4, 0, expert, freed=False) == 3 * 2000 + 2 * 4000


def test_slots_that_exceed_memory_are_refused_with_the_number_that_fits():
    """A slot takes 4 layers' weights, or 2 where they are freed, and a layer's gradients: 10,000 or 6,000 bytes."""
    check_slots(2, 4, EXPERT, freed=False, available_bytes=20_000)
    with pytest.raises(PlacementError, match="use at most 2, or re-materialise"):
        check_slots(3, 4, EXPERT, freed=False, available_bytes=29_999)
    check_slots(3, 4, EXPERT, freed=True, available_bytes=18_000)
    with pytest.raises(PlacementError, match=r"use at most 3$"):
        check_slots(4, 4, EXPERT, freed=True, available_bytes=20_000)

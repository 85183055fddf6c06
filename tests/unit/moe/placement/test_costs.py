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
    check_slots,
    materialised_bytes,
    own_evenly,
    owned_bytes,
    received_bytes,
    returned_bytes,
)

COSTS = CostModel(
    row_s=1e-6, expert_bytes=10_000, byte_s=1e-9, free_s=50e-6, row_bytes=1000, row_byte_s=2e-10, launch_s=5e-6
)


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


@pytest.mark.parametrize(
    ("rows_by_slots", "slots"),
    [
        pytest.param([1000, 1000, 1000], 0, id="even already: expert parallelism"),
        pytest.param([2000, 1000, 1000], 1, id="one slot is enough"),
        pytest.param([2000, 1500, 1400, 1395], 2, id="the third is not hidden and gains less than it costs"),
        pytest.param([2000, 1500, 1400, 1300], 3, id="the third is not hidden and still pays"),
    ],
)
def test_slots_are_used_while_they_pay(rows_by_slots, slots):
    assert COSTS.best_slots(rows_by_slots) == slots


def test_re_planning_pays_when_it_gains_more_than_moving_the_weights():
    assert COSTS.pays(1000, 900, replicas=9)  # 100 us gained, 90 us moved
    assert not COSTS.pays(1000, 900, replicas=10)
    assert not COSTS.pays(1000, 1000, replicas=0)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_chunks_hide_the_shorter_of_exchange_and_experts(degree):
    exchange_s, experts_s = 2 * 500 * 1000 * 2e-10, 500 * 1e-6
    assert COSTS.pipelined_s(500, degree) == pytest.approx(experts_s + exchange_s / degree + degree * 5e-6)


def test_the_number_of_chunks_balances_overlap_and_launches():
    assert COSTS.choose_degree(10) == 1  # 4 us to hide are not worth another launch
    assert COSTS.choose_degree(500) == 8
    assert COSTS.choose_degree(500, degrees=(2, 1)) == 2
    assert CostModel(1e-6, 1, 0.0, 0.0).choose_degree(500, degrees=(4, 1)) == 4  # as fast: the first


def test_costs_are_not_negative_and_slots_begin_with_none():
    with pytest.raises(PlacementError, match="byte_s is -1"):
        CostModel(1.0, 1, -1, 0.0)
    with pytest.raises(PlacementError, match="rows_by_slots is empty"):
        COSTS.best_slots([])


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


def test_kept_replicas_add_up_over_layers_and_freed_ones_do_not():
    alone = Placement.of_owners(PLACEMENT.owner_E, 3)
    layers = [PLACEMENT, PLACEMENT, alone, PLACEMENT]
    assert materialised_bytes(layers, 0, EXPERT, freed=False) == 3 * 2000 + 2000
    assert materialised_bytes(layers, 0, EXPERT, freed=True) == 2 * 2000 + 2000
    assert materialised_bytes([alone], 0, EXPERT, freed=False) == 0
    assert materialised_bytes([], 0, EXPERT, freed=True) == 0


def test_slots_that_exceed_memory_are_refused_with_the_number_that_fits():
    check_slots(2, 4, EXPERT, freed=False, available_bytes=20_000)
    with pytest.raises(PlacementError, match="use at most 2, or re-materialise"):
        check_slots(3, 4, EXPERT, freed=False, available_bytes=29_999)
    check_slots(3, 4, EXPERT, freed=True, available_bytes=18_000)
    with pytest.raises(PlacementError, match=r"use at most 3$"):
        check_slots(4, 4, EXPERT, freed=True, available_bytes=20_000)

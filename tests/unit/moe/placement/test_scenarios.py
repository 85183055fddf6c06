"""Load scenarios: each as defined, drawn alike for equal seeds."""

import numpy as np
import pytest

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import SCENARIOS, LoadTrace, own_evenly, scenario

EXPERTS, DEVICES = 16, 4


def trace_of(load_NLE: np.ndarray, load_NLSE: np.ndarray | None = None) -> LoadTrace:
    return LoadTrace(np.arange(len(load_NLE)), load_NLE, top_k=2, load_NLSE=load_NLSE)


def shares(name: str, step: int = 0, **arguments: object) -> np.ndarray:
    return scenario(name, EXPERTS, DEVICES, **arguments).probabilities_SE(step)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize(("num_experts", "num_devices"), [(16, 4), (3, 5), (7, 2)])
def test_the_rows_of_every_source_go_somewhere(name, num_experts, num_devices):
    trace = trace_of(np.ones((2, 1, num_experts), dtype=np.int64))
    loads = scenario(name, num_experts, num_devices, seed=1, trace=trace if name == "L8" else None)
    for step in (0, 11):
        probabilities_SE = loads.probabilities_SE(step)
        assert probabilities_SE.shape == (num_devices, num_experts)
        assert probabilities_SE.min() >= 0
        np.testing.assert_allclose(probabilities_SE.sum(axis=1), 1)
        counts_SE = loads.counts_SE(step, 100)
        assert counts_SE.dtype == np.int64
        assert counts_SE.sum(axis=1).tolist() == [100] * num_devices
        assert (counts_SE[probabilities_SE == 0] == 0).all()


def test_l0_is_uniform():
    np.testing.assert_allclose(shares("L0"), 1 / EXPERTS)


@pytest.mark.parametrize(("name", "exponent"), [("L1", 0.5), ("L2", 1.0), ("L3", 1.5)])
def test_l1_to_l3_are_zipf_over_experts_dealt_by_the_seed(name, exponent):
    share_E = shares(name, seed=5)[0]
    ranked = np.sort(share_E)[::-1]
    np.testing.assert_allclose(ranked / ranked[0], np.arange(1, EXPERTS + 1) ** -exponent)
    assert not np.array_equal(share_E, shares(name, seed=6)[0])


def test_l4_gives_half_to_one_expert():
    share_E = np.sort(shares("L4")[0])
    assert share_E[-1] == pytest.approx(0.5)
    np.testing.assert_allclose(share_E[:-1], 0.5 / (EXPERTS - 1))


def test_l5_moves_the_hot_expert_every_ten_steps():
    hot = [shares("L5", step, seed=2)[0].argmax() for step in range(40)]
    assert [len(set(hot[start : start + 10])) for start in range(0, 40, 10)] == [1, 1, 1, 1]
    assert len(set(hot[::10])) == 4
    assert shares("L5", 17)[0].max() == pytest.approx(0.5)


def test_l6_gives_nothing_to_experts_of_the_upper_half_of_the_ranks():
    share_E = shares("L6")[0]
    np.testing.assert_allclose(share_E[:8], 1 / 8)
    assert (share_E[8:] == 0).all()
    assert (scenario("L6", 6, 3).probabilities_SE(0)[0, :4] > 0).all()  # the upper half of three ranks is the last


def test_l7_sends_every_ranks_rows_to_another_rank():
    owner_E = own_evenly(1, EXPERTS, DEVICES)[0]
    wanted = [set(owner_E[share_E > 0]) for share_E in shares("L7")]
    assert wanted == [{2}, {3}, {0}, {1}]


def test_l7_passes_over_ranks_that_own_nothing():
    probabilities_SE = scenario("L7", 2, 4).probabilities_SE(0)  # owners are ranks 0 and 2
    assert probabilities_SE.argmax(axis=1).tolist() == [1, 0, 0, 1]


def test_l8_replays_a_trace_over_and_over():
    load_NLE = np.array([[[1, 3], [0, 5]], [[2, 2], [4, 1]]])
    loads = scenario("L8", 2, 3, trace=trace_of(load_NLE), layer=1)
    for step, share_E in enumerate([[0, 1], [0.8, 0.2], [0, 1]]):
        np.testing.assert_allclose(loads.probabilities_SE(step), np.tile(share_E, (3, 1)))


def test_l8_replays_each_sources_own_load():
    load_NLSE = np.array([[[[1, 0], [1, 3]]]])
    loads = scenario("L8", 2, 2, trace=trace_of(load_NLSE.sum(axis=2), load_NLSE))
    np.testing.assert_allclose(loads.probabilities_SE(0), [[1, 0], [0.25, 0.75]])


def test_equal_seeds_draw_equal_rows_in_any_order_of_steps():
    one, same, other = (scenario("L2", EXPERTS, DEVICES, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.counts_SE(7, 50), [same.counts_SE(step, 50) for step in (2, 7)][1])
    assert not np.array_equal(one.counts_SE(7, 50), one.counts_SE(8, 50))
    assert not np.array_equal(one.counts_SE(7, 50), other.counts_SE(7, 50))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        pytest.param("L9", {}, "'L9' is unknown; use one of L0", id="unknown"),
        pytest.param("L6", {"owner_E": np.full(EXPERTS, 3)}, "own all experts", id="nothing left"),
        pytest.param("L8", {}, "give it a trace", id="no trace"),
        pytest.param("L8", {"trace": trace_of(np.ones((1, 1, 2), dtype=int))}, "1 layers of 2 experts", id="experts"),
        pytest.param("L8", {"trace": trace_of(np.ones((1, 1, 16), dtype=int)), "layer": 1}, "layer 1", id="layer"),
        pytest.param("L8", {"trace": trace_of(np.zeros((1, 1, 16), dtype=int))}, "no rows in layer 0", id="no rows"),
        pytest.param(
            "L8",
            {"trace": trace_of(np.full((1, 1, 16), 2), np.ones((1, 1, 2, 16), dtype=int))},
            "2 sources, but 4",
            id="sources",
        ),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(name, arguments, message):
    with pytest.raises(PlacementError, match=message):
        scenario(name, EXPERTS, DEVICES, **arguments)

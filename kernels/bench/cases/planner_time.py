"""What planning costs on one core: off the critical path for all layers of a step, on it for one layer's dispatch."""

from collections.abc import Callable, Iterator

import numpy as np

from bench.measure import seconds
from bench.registry import AtMost, Bench, Row, case
from sparsetrain.moe.placement import (
    LoadForecast,
    Placement,
    Topology,
    dispatch,
    materialise,
    materialise_layers,
    own_evenly,
    reshard_owners,
    scenario,
)
from sparsetrain.moe.placement.topology import IntArray

_LAYERS, _EXPERTS, _CLUSTER = 64, 256, Topology(num_devices=1024, devices_per_node=8)
_TOKENS_PER_DEVICE, _TOP_K = 2048, 2


@case(
    "planner_time",
    "replicas of 64 layers of 256 experts on 1,024 devices; dispatch of 64 experts on 64 ranks; one core",
)
def planner_time(bench: Bench) -> Iterator[Row]:
    owners_LE = own_evenly(_LAYERS, _EXPERTS, _CLUSTER.num_devices)
    loads = {name: _load(name, owners_LE) for name in ("L0", "L1", "L2", "L3", "L4", "L6")}
    for name, load_LE in loads.items():
        note = "from a step's load to 64 placements with fingerprints, one spare slot a device" if name == "L0" else ""
        yield Row(f"plan, {name}", _times(_planning(load_LE, owners_LE), bench.pairs), target=AtMost(0.050), note=note)
    reshard = _times(lambda: reshard_owners(loads["L6"], owners_LE, _CLUSTER), bench.pairs)
    yield Row("reshard, L6", reshard, note="all layers; due once in many steps")
    for topology in (Topology(8, 4), Topology(64, 8)):
        for name in ("L1", "L2", "L3", "L4"):
            loads_of_ranks = scenario(name, 64, topology.num_devices)
            counts_SE = loads_of_ranks.counts_SE(0, _TOKENS_PER_DEVICE * _TOP_K)
            placement = materialise(counts_SE.sum(axis=0), loads_of_ranks.owner_E, topology, slots=1)
            call = _dispatching(counts_SE, placement, topology)
            name = f"dispatch, 64 experts on {topology.num_devices} ranks, {name}"
            yield Row(name, _times(call, 10 * bench.pairs), target=AtMost(1e-3))


def _load(name: str, owners_LE: IntArray) -> IntArray:
    """Rows of every expert in every layer, int64 [L, E]; the layers differ in seed."""
    rows = _TOKENS_PER_DEVICE * _TOP_K * _CLUSTER.num_devices
    load_LE = []
    for layer, owner_E in enumerate(owners_LE):
        loads = scenario(name, _EXPERTS, _CLUSTER.num_devices, seed=layer, owner_E=owner_E)
        load_LE.append(np.random.default_rng(layer).multinomial(rows, loads.probabilities_SE(0)[0]))
    return np.stack(load_LE)


def _planning(load_LE: IntArray, owners_LE: IntArray) -> Callable[[], object]:
    forecast = LoadForecast()
    for _ in range(forecast.window):
        forecast.update(load_LE)

    def plan() -> list[int]:
        forecast.update(load_LE)
        assert forecast.mean_LE is not None
        placements = materialise_layers(forecast.mean_LE, owners_LE, _CLUSTER, slots=1)
        return [placement.fingerprint for placement in placements]

    return plan


def _dispatching(counts_SE: IntArray, placement: Placement, topology: Topology) -> Callable[[], object]:
    return lambda: dispatch(counts_SE, Placement(placement.owner_E, placement.holders_ED), topology)


def _times(call: Callable[[], object], samples: int) -> list[float]:
    """Seconds of each of several calls, after one to warm up."""
    call()
    return [seconds(call) for _ in range(samples)]

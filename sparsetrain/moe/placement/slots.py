"""How many spare slots of a layer are worth filling, by what replicas cost and gain."""

from collections.abc import Iterable

import numpy as np

from sparsetrain.moe.placement.cost import CostModel
from sparsetrain.moe.placement.dispatch import DispatchMethod, dispatch
from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.topology import FloatArray, Topology


def slots_to_try(spare_slots: int) -> list[int]:
    """1, 2, 4, ... and all of them: few enough to plan for each in every step."""
    return sorted({1 << power for power in range(spare_slots.bit_length())} | {spare_slots}) if spare_slots else []


def fastest_placement(
    rows_E: FloatArray,
    alone: Placement,
    others: Iterable[Placement],
    topology: Topology,
    cost: CostModel,
    *,
    method: DispatchMethod = "capacity",
) -> Placement:
    """The placement with which a layer takes the least time; of equally fast ones the first.

    Args:
        rows_E: [E], expected rows of each expert, coming evenly from all devices.
        alone: Owners without replicas: expert parallelism.
        others: The same owners with replicas, for example those of 1, 2, ... slots.
        topology: Where the devices stand.
        cost: Measured seconds; every rank must hold the same.
        method: How rows are split among replicas.
    """
    num_devices = topology.num_devices
    fastest, seconds = alone, cost.layer_s(float(np.bincount(alone.owner_E, rows_E, num_devices).max()), 0)
    counts_SE = np.tile(np.rint(rows_E / num_devices).astype(np.int64), (num_devices, 1))
    for placement in others:
        replicas = most_replicas(placement)
        if cost.layer_s(rows_E.sum() / num_devices, replicas) >= seconds:
            continue  # not even if it made all devices equally full
        rows_D = dispatch(counts_SE, placement, topology, method=method).load_D
        if (needed := cost.layer_s(float(rows_D.max()), replicas)) < seconds:
            fastest, seconds = placement, needed
    return fastest


def most_replicas(placement: Placement, besides: Placement | None = None) -> int:
    """Replicas of the device that has most of them; with `besides`, of those that it has not there."""
    is_new_ED = placement.holders_ED & ~besides.holders_ED if besides else placement.holders_ED
    is_new_ED = is_new_ED & (placement.owner_E[:, None] != np.arange(placement.num_devices))
    return int(is_new_ED.sum(axis=0).max())

"""How many spare slots of a layer are worth filling, by what replicas cost and gain."""

from collections.abc import Iterable

import numpy as np

from sparsetrain.moe.placement.cost import CostModel
from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.topology import FloatArray


def slots_to_try(spare_slots: int) -> list[int]:
    """1, 2, 4, ... and all of them: few enough to plan for each in every step."""
    return sorted({1 << power for power in range(spare_slots.bit_length())} | {spare_slots}) if spare_slots else []


def fastest_placement(rows_E: FloatArray, alone: Placement, others: Iterable[Placement], cost: CostModel) -> Placement:
    """The placement with which a layer takes the least time; of equally fast ones the first.

    Args:
        rows_E: [E], expected rows of each expert.
        alone: Owners without replicas: expert parallelism.
        others: The same owners with replicas, for example those of 1, 2, ... slots.
        cost: Measured seconds; every rank must hold the same.
    """
    placements = [alone, *others]
    return min(placements, key=lambda each: cost.layer_s(fullest_rows(rows_E, each), most_replicas(each)))


def fullest_rows(rows_E: FloatArray, placement: Placement) -> float:
    """Rows of the fullest device when replicas take all that they can: a bound that dispatching comes close to.

    It is the mean, or what experts without a replica leave on their device. Dispatching itself would take milliseconds
    for each of hundreds of devices, in every layer and step.
    """
    num_devices = placement.num_devices
    fixed_E = np.where(placement.holders_ED.sum(axis=1) == 1, rows_E, 0.0)
    fixed_D = np.bincount(placement.owner_E, fixed_E, num_devices)
    return max(float(fixed_D.max()), float(rows_E.sum()) / num_devices)


def most_replicas(placement: Placement, besides: Placement | None = None) -> int:
    """Replicas of the device that has most of them; with `besides`, of those that it has not there."""
    is_new_ED = placement.holders_ED & ~besides.holders_ED if besides else placement.holders_ED
    is_new_ED = is_new_ED & (placement.owner_E[:, None] != np.arange(placement.num_devices))
    return int(is_new_ED.sum(axis=0).max())

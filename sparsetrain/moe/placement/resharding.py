"""Who owns which expert from now on: new owners where replicas alone cannot even the load out."""

import numpy as np
from numpy.typing import ArrayLike

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.materialise import PlacementMethod, best_plan, checked_hot, checked_load
from sparsetrain.moe.placement.paper import shard_heterogeneously
from sparsetrain.moe.placement.plan import TINY, Layers
from sparsetrain.moe.placement.topology import FloatArray, IntArray, Topology


def reshard_owners(
    load_LE: ArrayLike,
    owners_LE: IntArray,
    topology: Topology,
    *,
    slots: int = 1,
    hot: int | None = None,
    method: PlacementMethod = "best",
    tolerance: float = 0.02,
) -> IntArray:
    """New owners of the experts of all layers; each device owns as many over all layers as before.

    `paper` (arXiv 2502.02581): heterogeneous sharding, all layers anew.
    `best`: only layers that stay uneven with the best replicas, and only by swaps of two experts between devices, each
    the one that relieves the fullest device most; a layer keeps its owners where that gains less than the tolerance. So
    few experts move, and a device owns as many experts of each layer as before.

    Args:
        load_LE: [L, E], rows of each expert, a mean over the steps since the last time.
        owners_LE: int64 [L, E].
        topology: Where the devices stand.
        slots: Spare expert slots of each device in every layer.
        hot: At most so many experts of a layer get replicas; None sets no limit.
        method: `best` or `paper`.
        tolerance: With `best`, loads this much above the mean count as even.

    Returns:
        int64 [L, E]; equal to `owners_LE` where nothing is to be gained.

    Raises:
        PlacementError: Shapes do not agree, a load is negative or not finite, a number is negative, or the method is
            unknown.
    """
    load_LE = checked_load(load_LE, owners_LE, topology)
    hot = checked_hot(hot, load_LE.shape[1], slots, tolerance)
    if method == "paper":
        return shard_heterogeneously(load_LE, owners_LE, topology, hot=hot)
    if method != "best":
        raise PlacementError(f"resharding method {method!r} is unknown; use 'best' or 'paper'")

    def peaks(load_LE: FloatArray, owners_LE: IntArray) -> FloatArray:
        return best_plan(load_LE, owners_LE, topology, slots=slots, hot=hot, tolerance=tolerance).peak_L

    peak_L = peaks(load_LE, owners_LE)
    uneven = np.flatnonzero(peak_L > 1 + 2 * tolerance + TINY)
    if not len(uneven):
        return owners_LE.copy()
    swapped_LE = owners_LE[uneven].copy()
    for load_E, owner_E in zip(
        Layers(load_LE[uneven], swapped_LE, topology.num_devices).load_LE, swapped_LE, strict=True
    ):
        _swap_until_even(load_E, owner_E, topology.num_devices, tolerance)
    better = peaks(load_LE[uneven], swapped_LE) < peak_L[uneven] - tolerance
    resharded_LE = owners_LE.copy()
    resharded_LE[uneven[better]] = swapped_LE[better]
    return resharded_LE


def _swap_until_even(load_E: FloatArray, owner_E: IntArray, num_devices: int, tolerance: float) -> None:
    """Swap experts of the fullest device with lighter ones of others, in place, until it is even or none helps.

    What an expert has beyond a device's mean load is left out: replicas must carry that wherever the expert lives.
    """
    load_E = np.minimum(load_E, 1.0)
    load_D: FloatArray = np.bincount(owner_E, load_E, num_devices).astype(np.float64)
    settled_D = np.zeros(num_devices, dtype=np.bool_)
    while (excess_D := np.where(settled_D, 0.0, load_D - 1)).max() > tolerance:
        fullest = int(excess_D.argmax())
        here = np.flatnonzero(owner_E == fullest)
        moved_HE = load_E[here, None] - load_E
        fuller_HE = np.maximum(load_D[fullest] - moved_HE, load_D[owner_E] + moved_HE)
        fuller_HE[:, here] = np.inf
        best = int(fuller_HE.argmin())
        if fuller_HE.flat[best] > load_D[fullest] - tolerance / 2:
            settled_D[fullest] = True
            continue
        out, back = here[best // len(load_E)], best % len(load_E)
        other = owner_E[back]
        owner_E[out], owner_E[back] = other, fullest
        load_D[[fullest, other]] += np.array([-1.0, 1.0]) * moved_HE.flat[best]

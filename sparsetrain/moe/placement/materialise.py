"""Sparse materialisation: which experts get replicas on which devices in a step, from the load that is expected."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.paper import materialise_by_share
from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.plan import TINY, Layers, Plan
from sparsetrain.moe.placement.relief import relieve
from sparsetrain.moe.placement.sweep import sweep
from sparsetrain.moe.placement.topology import FloatArray, IntArray, Topology

PlacementMethod = Literal["best", "paper"]

_RELIEF_WORK, _RELIEF_VARIANTS = 2**22, 16
"""Array elements that `relieve` may go through, and the ways it tries at most."""


def materialise(
    load_E: ArrayLike,
    owner_E: IntArray,
    topology: Topology,
    *,
    slots: int,
    hot: int | None = None,
    method: PlacementMethod = "best",
    tolerance: float = 0.02,
) -> Placement:
    """Replicas for one layer; see `materialise_layers`.

    Args:
        load_E: [E], expected rows of each expert.
        owner_E: int64 [E].
        topology: Where the devices stand.
        slots: Spare expert slots of each device.
        hot: At most so many experts get replicas.
        method: `best` or `paper`.
        tolerance: With `best`, loads this much above the mean count as even.

    Raises:
        PlacementError: As for `materialise_layers`.
    """
    layers = materialise_layers(
        np.asarray(load_E)[None], owner_E[None], topology, slots=slots, hot=hot, method=method, tolerance=tolerance
    )
    return layers[0]


def materialise_layers(
    load_LE: ArrayLike,
    owners_LE: IntArray,
    topology: Topology,
    *,
    slots: int,
    hot: int | None = None,
    method: PlacementMethod = "best",
    tolerance: float = 0.02,
) -> list[Placement]:
    """Replicas for every layer.

    `paper` (arXiv 2502.02581): the `hot` hottest experts share all slots in proportion to their load.
    `best`: no more replicas than an even load needs, the better of two plans (`sweep`, `relief`);
    none at all where owners alone are even within the tolerance.

    Args:
        load_LE: [L, E], expected rows of each expert, 0 or more.
        owners_LE: int64 [L, E].
        topology: Where the devices stand.
        slots: Spare expert slots of each device in every layer (the paper's m); 0 is expert parallelism.
        hot: At most so many experts of a layer get replicas (the paper's t); None sets no limit.
        method: `best` or `paper`.
        tolerance: With `best`, loads this much above the mean count as even.

    Returns:
        One placement a layer. No device holds more than `slots` experts that it does not own, and no more than `hot`
        experts of a layer have replicas.

    Raises:
        PlacementError: Shapes do not agree, a load is negative or not finite, a number is negative, or the method is
            unknown.
    """
    load_LE = checked_load(load_LE, owners_LE, topology)
    hot = checked_hot(hot, load_LE.shape[1], slots, tolerance)
    if method == "paper":
        return [
            Placement(owner_E, materialise_by_share(load_E, owner_E, topology, slots=slots, hot=hot))
            for load_E, owner_E in zip(load_LE, owners_LE, strict=True)
        ]
    if method != "best":
        raise PlacementError(f"placement method {method!r} is unknown; use 'best' or 'paper'")
    holders_LED = np.zeros((*load_LE.shape, topology.num_devices), dtype=np.bool_)
    holders_LED[np.arange(len(load_LE))[:, None], np.arange(load_LE.shape[1]), owners_LE] = True
    plan = best_plan(load_LE, owners_LE, topology, slots=slots, hot=hot, tolerance=tolerance)
    holders_LED[plan.layer_R, plan.expert_R, plan.device_R] = True
    return [Placement(owner_E, holders_ED) for owner_E, holders_ED in zip(owners_LE, holders_LED, strict=True)]


def best_plan(
    load_LE: FloatArray, owners_LE: IntArray, topology: Topology, *, slots: int, hot: int, tolerance: float
) -> Plan:
    """The plan of `sweep`, or that of `relieve` in layers that the first leaves uneven and the second less so.

    `relieve` gets the most uneven layers, and tries as many variants, as a bound on its work allows: at any number of
    devices planning stays within milliseconds.

    Arguments as for `sweep`; no slots or no hot experts mean no replicas.
    """
    if not slots or not hot:
        peak_L = Layers(load_LE, owners_LE, topology.num_devices).load_LD.max(axis=1)
        return Plan.gather([], peak_L)
    swept = sweep(load_LE, owners_LE, topology, slots=slots, hot=hot, tolerance=tolerance)
    num_experts, num_devices = load_LE.shape[1], topology.num_devices
    affordable = _RELIEF_WORK // (slots * num_devices * max(num_experts, num_devices))
    uneven = np.argsort(-swept.peak_L, kind="stable")[:affordable]
    uneven = uneven[swept.peak_L[uneven] > 1 + 2 * tolerance + TINY]
    if not len(uneven):
        return swept
    variants = min(affordable // len(uneven), _RELIEF_VARIANTS)
    relieved = relieve(
        load_LE[uneven],
        owners_LE[uneven],
        topology,
        slots=slots,
        hot=hot,
        tolerance=tolerance,
        variants=variants,
    )
    better = np.flatnonzero(relieved.peak_L < swept.peak_L[uneven] - TINY)
    return swept.with_layers(uneven[better], relieved.only_layers(better))


def checked_hot(hot: int | None, num_experts: int, slots: int, tolerance: float) -> int:
    """How many experts may get replicas, where None is all.

    Raises:
        PlacementError: A number is negative.
    """
    hot = num_experts if hot is None else min(hot, num_experts)
    if slots < 0 or hot < 0 or tolerance < 0:
        raise PlacementError(f"slots={slots}, hot={hot} and tolerance={tolerance} must not be negative")
    return hot


def checked_load(load_LE: ArrayLike, owners_LE: IntArray, topology: Topology) -> FloatArray:
    """The load as float64 [L, E].

    Raises:
        PlacementError: It is not [L, E] of numbers of 0 or more, or owners do not go with it or are no devices.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    if load.ndim != 2 or load.shape != owners_LE.shape:
        raise PlacementError(f"load of shape {load.shape} and owners of shape {owners_LE.shape} must both be [L, E]")
    if not np.isfinite(load).all() or load.min(initial=0.0) < 0:
        raise PlacementError("an expert's load is negative or not a finite number")
    if owners_LE.size and not 0 <= owners_LE.min() <= owners_LE.max() < topology.num_devices:
        raise PlacementError(f"owners must be devices 0 to {topology.num_devices - 1}")
    return load

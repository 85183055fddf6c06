"""How many rows each holder of an expert takes, so that no device is fuller than it must be."""

import numpy as np

from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.topology import FloatArray, IntArray, Topology

_ROUNDS = 30
_EVEN = 0.05


def capacity_split(counts_SE: IntArray, placement: Placement, topology: Topology, slack: float) -> IntArray:
    """Rows of each (expert, holder) pair, int64 [P]; over an expert's holders they sum to its rows exactly."""
    expert_P, device_P = placement.expert_P, placement.device_P
    num_experts, num_devices = placement.num_experts, placement.num_devices
    load_E = counts_SE.sum(axis=0)
    holders_E = np.bincount(expert_P, minlength=num_experts)
    prior_P = near_split(counts_SE, placement, topology)
    single_P = holders_E[expert_P] == 1
    alone_D = np.bincount(device_P[single_P], load_E[expert_P[single_P]], num_devices)
    capacity = max(load_E.sum() / num_devices, alone_D.max()) * (1 + slack)
    split_P = prior_P
    if np.bincount(device_P, prior_P, num_devices).max() > capacity:
        prior_P = (1 - _EVEN) * prior_P + _EVEN * load_E[expert_P] / holders_E[expert_P]
        split_P = prior_P
        scale_D = np.ones(num_devices)
        for _ in range(_ROUNDS):
            raw_P = prior_P * scale_D[device_P]
            grow_E = load_E / np.maximum(np.bincount(expert_P, raw_P, num_experts), 1e-300)
            split_P = raw_P * grow_E[expert_P]
            load_D = np.bincount(device_P, split_P, num_devices)
            if load_D.max() <= capacity:
                break
            scale_D = np.minimum(scale_D * capacity / np.maximum(load_D, 1e-300), 1.0)
    return _round(split_P, load_E, expert_P)


def near_split(counts_SE: IntArray, placement: Placement, topology: Topology) -> FloatArray:
    """What each pair takes by the paper's dispatch, before rounding: float64 [P]."""
    expert_P, device_P = placement.expert_P, placement.device_P
    node_D, first_N = topology.node_D, topology.first_of_node_N
    holders_DE = placement.holders_ED.T
    away_NE = np.add.reduceat(np.where(holders_DE, 0, counts_SE), first_N, axis=0)
    holders_NE = np.add.reduceat(holders_DE, first_N, axis=0, dtype=np.int64)
    share_NE = away_NE / np.maximum(holders_NE, 1)
    far_E = np.where(holders_NE == 0, away_NE, 0).sum(axis=0) / holders_NE.sum(axis=0)
    near_P: FloatArray = counts_SE[device_P, expert_P] + share_NE[node_D[device_P], expert_P] + far_E[expert_P]
    return near_P


def _round(split_P: FloatArray, load_E: IntArray, expert_P: IntArray) -> IntArray:
    """Whole rows within one of the given ones, with exact sums per expert."""
    before_E = np.cumsum(load_E) - load_E
    first_E = np.searchsorted(expert_P, np.arange(len(load_E)))
    end_P = np.cumsum(split_P)
    end_P -= (end_P - split_P)[first_E][expert_P]
    rounded_P = np.minimum(np.floor(end_P + 0.5).astype(np.int64), load_E[expert_P])
    rounded_P[np.append(first_E[1:], len(expert_P)) - 1] = load_E
    rounded_P += before_E[expert_P]
    return np.diff(rounded_P, prepend=0)

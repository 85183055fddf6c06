"""Relieve the fullest device by one replica at a time, all layers at once."""

import numpy as np

from sparsetrain.moe.placement.plan import TINY, Layers, Plan
from sparsetrain.moe.placement.topology import BoolArray, FloatArray, IntArray, Topology

_NEAR_ENOUGH = 0.5
"""A device in a node that lacks the expert is preferred while it can take this share of what the emptiest could."""


def relieve(
    load_LE: FloatArray, owners_LE: IntArray, topology: Topology, *, slots: int, hot: int, tolerance: float
) -> Plan:
    """Put a replica of the fullest device's hottest expert on the emptiest device, until nothing helps the fullest.

    Better than `sweep` where experts are few and uneven, at a step for each replica. Arguments and result as there.
    """
    layers = Layers(load_LE, owners_LE, topology.num_devices)
    state = _Relief(layers, topology, slots, hot, tolerance)
    found = []
    for _ in range(slots * topology.num_devices):
        expert_L, device_L, active_L = state.step()
        if not active_L.any():
            break
        found.append((layers.layer_L[active_L], expert_L[active_L], device_L[active_L]))
    return Plan.gather(found, state.load_LD.max(axis=1))


class _Relief:
    """Who holds what so far, and how full devices would be."""

    def __init__(self, layers: Layers, topology: Topology, slots: int, hot: int, tolerance: float) -> None:
        num_layers, num_experts = layers.load_LE.shape
        self.layers, self.hot, self.level = layers, hot, 1 + tolerance
        self.node_D = topology.node_D
        self.load_LD = layers.load_LD.copy()
        self.left_LE = layers.load_LE.copy()  # rows that the owner has not given away
        self.free_LD = np.full((num_layers, topology.num_devices), slots)
        layer, expert = np.indices((num_layers, num_experts))
        self.holders_LED = np.zeros((num_layers, num_experts, topology.num_devices), dtype=np.bool_)
        self.holders_LED[layer, expert, layers.owners_LE] = True
        self.in_node_LEN = np.zeros((num_layers, num_experts, topology.num_nodes), dtype=np.bool_)
        self.in_node_LEN[layer, expert, self.node_D[layers.owners_LE]] = True
        self.replicated_LE = np.zeros((num_layers, num_experts), dtype=np.bool_)
        self.active_L = np.ones(num_layers, dtype=np.bool_)

    def step(self) -> tuple[IntArray, IntArray, BoolArray]:
        """Place one replica in every layer that can be relieved: its expert, its device, and whether there is one."""
        layer_L, load_LD = self.layers.layer_L, self.load_LD
        owner_L = load_LD.argmax(axis=1)
        surplus_L = load_LD[layer_L, owner_L] - self.level
        may_LE = (self.layers.owners_LE == owner_L[:, None]) & (
            self.replicated_LE | (self.replicated_LE.sum(axis=1) < self.hot)[:, None]
        )
        left_LE = np.where(may_LE, self.left_LE, 0.0)
        expert_L = left_LE.argmax(axis=1)
        left_L = left_LE[layer_L, expert_L]
        device_L = self._receiver(expert_L, np.minimum(left_L, surplus_L))
        room_L = self.level - load_LD[layer_L, device_L]
        free_L = (self.free_LD[layer_L, device_L] > 0) & ~self.holders_LED[layer_L, expert_L, device_L]
        self.active_L &= (surplus_L > TINY) & (left_L > 0) & free_L & (load_LD[layer_L, device_L] < 1)

        rows_L = np.where(room_L <= left_L, room_L, np.minimum(left_L, surplus_L)) * self.active_L
        load_LD[layer_L, owner_L] -= rows_L
        load_LD[layer_L, device_L] += rows_L
        self.left_LE[layer_L, expert_L] -= rows_L
        self.free_LD[layer_L, device_L] -= self.active_L
        self.holders_LED[layer_L, expert_L, device_L] |= self.active_L
        self.in_node_LEN[layer_L, expert_L, self.node_D[device_L]] |= self.active_L
        self.replicated_LE[layer_L, expert_L] |= self.active_L
        return expert_L, device_L, self.active_L.copy()

    def _receiver(self, expert_L: IntArray, rows_L: FloatArray) -> IntArray:
        """The emptiest device that can take the expert, or the emptiest in a node that lacks it, if that has room."""
        layer_L = self.layers.layer_L
        can_LD = (self.free_LD > 0) & ~self.holders_LED[layer_L, expert_L]
        load_LD = np.where(can_LD, self.load_LD, np.inf)
        far_LD = np.where(self.in_node_LEN[layer_L, expert_L][:, self.node_D], np.inf, load_LD)
        near_L, far_L = load_LD.argmin(axis=1), far_LD.argmin(axis=1)
        taken_near_L, taken_far_L = (
            np.minimum(self.level - load[layer_L, device], rows_L)
            for load, device in ((load_LD, near_L), (far_LD, far_L))
        )
        device_L: IntArray = np.where(taken_far_L >= _NEAR_ENOUGH * taken_near_L, far_L, near_L)
        return device_L

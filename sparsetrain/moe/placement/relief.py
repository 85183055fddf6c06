"""Relieve overfull devices by one replica at a time, in several ways, all layers at once.

Better than `sweep` where experts are few and uneven, at a step for each replica. Which overfull device is relieved
first decides whether the slots suffice: the fullest first is good, but no order always is. So the same is done several
times, with the fullest device's lead blurred by up to a mean load differently each time, and the best outcome is taken.
"""

import numpy as np

from sparsetrain.moe.placement.plan import TINY, Layers, Plan
from sparsetrain.moe.placement.topology import BoolArray, FloatArray, IntArray, Topology

_NEAR_ENOUGH = 0.5
"""A device in a node that lacks the expert is preferred while it can take this share of what the emptiest could."""


def relieve(
    load_LE: FloatArray,
    owners_LE: IntArray,
    topology: Topology,
    *,
    slots: int,
    hot: int,
    tolerance: float,
    variants: int,
) -> Plan:
    """Replicate an overfull device's hottest expert to one with room, until none can be relieved; keep the best way.

    Arguments and result as for `sweep`; `variants` is the number of ways that are tried.
    """
    layers = Layers(np.repeat(load_LE, variants, axis=0), np.repeat(owners_LE, variants, axis=0), topology.num_devices)
    state = _Relief(layers, topology, slots, hot, tolerance, variants)
    found = []
    for _ in range(slots * topology.num_devices):
        expert_L, device_L, placed_L = state.step()
        if not placed_L.any():
            break
        found.append((layers.layer_L[placed_L], expert_L[placed_L], device_L[placed_L]))
    peak_LV = state.load_LD.max(axis=1).reshape(-1, variants)
    # The first of equally good ways: the first pays most heed to nodes.
    best_L = (peak_LV <= peak_LV.min(axis=1, keepdims=True) + TINY).argmax(axis=1)
    tried = Plan.gather(found, peak_LV[np.arange(len(load_LE)), best_L])
    layer_R, variant_R = np.divmod(tried.layer_R, variants)
    kept_R = variant_R == best_L[layer_R]
    return Plan(layer_R[kept_R], tried.expert_R[kept_R], tried.device_R[kept_R], tried.peak_L)


class _Relief:
    """Who holds what so far, and how full devices would be; a layer's variants are layers here."""

    def __init__(
        self, layers: Layers, topology: Topology, slots: int, hot: int, tolerance: float, variants: int
    ) -> None:
        num_layers, num_experts = layers.load_LE.shape
        self.layers, self.hot, self.level = layers, hot, 1 + tolerance
        self.node_D = topology.node_D
        self.load_LD = layers.load_LD.copy()
        self.left_LE = layers.load_LE.copy()  # rows that the owner has not given away
        self.free_LD = np.full((num_layers, topology.num_devices), slots)
        layer, expert = layers.layer_L[:, None], np.arange(num_experts)
        self.holders_LED = np.zeros((num_layers, num_experts, topology.num_devices), dtype=np.bool_)
        self.holders_LED[layer, expert, layers.owners_LE] = True
        self.in_node_LEN = np.zeros((num_layers, num_experts, topology.num_nodes), dtype=np.bool_)
        self.in_node_LEN[layer, expert, self.node_D[layers.owners_LE]] = True
        self.replicated_LE = np.zeros((num_layers, num_experts), dtype=np.bool_)
        self.going_L = np.ones(num_layers, dtype=np.bool_)
        # The first variant is the plain one. Of the others, every second one looks for devices that it can fill whole.
        blur_VD = np.random.default_rng(0).random((variants, topology.num_devices))
        blur_VD[0] = 0.0
        self.blur_LD = np.tile(blur_VD, (num_layers // variants, 1))
        self.fill_L = layers.layer_L % variants % 2 == 1

    def step(self) -> tuple[IntArray, IntArray, BoolArray]:
        """Place one replica in every layer that can be relieved: its expert, its device, and whether there is one."""
        layer_L, load_LD = self.layers.layer_L, self.load_LD
        owner_L = np.where(load_LD > self.level + TINY, load_LD + self.blur_LD, 0.0).argmax(axis=1)
        surplus_L = load_LD[layer_L, owner_L] - self.level
        may_LE = (self.layers.owners_LE == owner_L[:, None]) & (
            self.replicated_LE | (self.replicated_LE.sum(axis=1) < self.hot)[:, None]
        )
        left_LE = np.where(may_LE, self.left_LE, 0.0)
        expert_L = left_LE.argmax(axis=1)
        left_L = left_LE[layer_L, expert_L]
        can_LD = (self.free_LD > 0) & ~self.holders_LED[layer_L, expert_L]
        device_L = self._receiver(expert_L, left_L, np.minimum(left_L, surplus_L), np.where(can_LD, load_LD, np.inf))
        room_L = self.level - load_LD[layer_L, device_L]
        has_room_L = can_LD[layer_L, device_L] & (load_LD[layer_L, device_L] < 1)
        self.going_L &= (surplus_L > TINY) & (left_L > 0) & has_room_L

        rows_L = np.where(room_L <= left_L, room_L, np.minimum(left_L, surplus_L)) * self.going_L
        load_LD[layer_L, owner_L] -= rows_L
        load_LD[layer_L, device_L] += rows_L
        self.left_LE[layer_L, expert_L] -= rows_L
        self.free_LD[layer_L, device_L] -= self.going_L
        self.holders_LED[layer_L, expert_L, device_L] |= self.going_L
        self.in_node_LEN[layer_L, expert_L, self.node_D[device_L]] |= self.going_L
        self.replicated_LE[layer_L, expert_L] |= self.going_L
        return expert_L, device_L, self.going_L.copy()

    def _receiver(self, expert_L: IntArray, left_L: FloatArray, rows_L: FloatArray, load_LD: FloatArray) -> IntArray:
        """The emptiest device that can take the expert, or the emptiest of the preferred ones, if that is as good.

        Preferred are devices in a node that lacks the expert, while they have room; in variants that fill, devices that
        the expert's rows can fill.

        Args:
            expert_L: Experts.
            left_L: Their rows that are still at the owner.
            rows_L: How many of them the owner has to give.
            load_LD: Loads of devices, infinite where the expert cannot go.
        """
        layer_L = self.layers.layer_L
        far_LD = np.where(self.in_node_LEN[layer_L, expert_L][:, self.node_D], np.inf, load_LD)
        filled_LD = np.where(self.level - load_LD <= left_L[:, None] + TINY, load_LD, np.inf)
        preferred_LD = np.where(self.fill_L[:, None], filled_LD, far_LD)
        near_L, preferred_L = load_LD.argmin(axis=1), preferred_LD.argmin(axis=1)
        near_load_L, preferred_load_L = load_LD[layer_L, near_L], preferred_LD[layer_L, preferred_L]
        taken_L = np.minimum(self.level - near_load_L, rows_L)
        enough_L = np.where(self.fill_L, preferred_load_L < 1, self.level - preferred_load_L >= _NEAR_ENOUGH * taken_L)
        device_L: IntArray = np.where(enough_L, preferred_L, near_L)
        return device_L

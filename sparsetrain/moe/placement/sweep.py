"""Top devices with room up to the mean, in one pass over the experts of overfull devices, all layers at once.

Walker's alias method shows that n bins of any content are made even by pouring into each from one other bin. Here: a
device with room is filled by one expert of an overfull device, and an overfull device that gave too much is filled in
turn by the next. So one spare slot a device suffices, as long as single experts are large enough. Both sides are taken
in fixed orders and an expert fills a run of devices at once, so the number of steps is that of the experts that give,
whatever the number of devices.
"""

import numpy as np

from sparsetrain.moe.placement.plan import TINY, Layers, Plan
from sparsetrain.moe.placement.topology import BoolArray, FloatArray, IntArray, Topology


def sweep(
    load_LE: FloatArray, owners_LE: IntArray, topology: Topology, *, slots: int, hot: int, tolerance: float
) -> Plan:
    """Fill devices with room in one pass over the experts of the overfull ones.

    Args:
        load_LE: float64 [L, E], expected rows of each expert.
        owners_LE: int64 [L, E].
        topology: Where the devices stand.
        slots: Spare expert slots of a device and layer, at least 1.
        hot: At most so many experts of a layer get replicas.
        tolerance: A device this much above the mean counts as even.
    """
    return _Sweep(Layers(load_LE, owners_LE, topology.num_devices), topology, slots, hot, tolerance).run()


class _Sweep:
    """State of the pass: per layer, how far the list of devices with room is used up, and who waits to be filled.

    Loads of devices and the list of room are flat, a layer after the other, and looked up by flat places: the arrays of
    a step are as short as there are layers, so what counts is the number of calls.
    """

    def __init__(self, layers: Layers, topology: Topology, slots: int, hot: int, tolerance: float) -> None:
        self.layers, self.slots, self.hot, self.tolerance = layers, slots, hot, tolerance
        self.level = 1 + tolerance
        num_layers, num_devices = layers.load_LD.shape
        self.load = layers.load_LD.ravel().copy()
        self._list_givers()
        self._list_devices_with_room(topology)
        self.next_L = np.arange(num_layers) * (num_devices + 1)  # places in the list of room
        self.given_L = np.zeros(num_layers, dtype=np.int64)  # experts with replicas so far
        # At most one device of a layer waits: an owner that gave too much, or one that an expert could not fill.
        self.waiting_L = np.arange(num_layers) * num_devices  # places in the list of loads
        self.need_L = np.zeros(num_layers)
        self.slots_left_L = np.zeros(num_layers, dtype=np.int64)

    def _list_givers(self) -> None:
        """Experts of overfull devices: the fullest device first, and of a device the hottest expert."""
        layers = self.layers
        by_load_LE = np.argsort(-layers.load_LE, axis=1, kind="stable")
        full_LE = np.take_along_axis(layers.load_LD, np.take_along_axis(layers.owners_LE, by_load_LE, 1), 1)
        by_device_LE = np.argsort(-full_LE, axis=1, kind="stable")
        num_givers = int((full_LE > self.level).sum(axis=1).max(initial=0))
        giver_LJ = np.take_along_axis(by_load_LE, by_device_LE[:, :num_givers], 1)
        owner_LJ = np.take_along_axis(layers.owners_LE, giver_LJ, 1) + layers.layer_L[:, None] * layers.load_LD.shape[1]
        self.giver_LJ, self.owner_JL = giver_LJ, np.ascontiguousarray(owner_LJ.T)
        self.rows_JL = np.ascontiguousarray(np.take_along_axis(layers.load_LE, giver_LJ, 1).T)

    def _list_devices_with_room(self, topology: Topology) -> None:
        """The emptiest device of each node, then the second of each: so that an expert's replicas spread over nodes."""
        load_LD = self.layers.load_LD
        num_layers, num_devices = load_LD.shape
        padded = np.full((num_layers, topology.num_nodes * topology.devices_per_node), np.inf)
        padded[:, :num_devices] = load_LD
        in_nodes = padded.reshape(num_layers, topology.num_nodes, -1)
        rank = np.argsort(np.argsort(in_nodes, axis=2, kind="stable"), axis=2, kind="stable")
        rank_LD = rank.reshape(num_layers, -1)[:, :num_devices]
        has_room_LD = load_LD < 1
        key_LD = np.where(has_room_LD, rank_LD + load_LD / 2, np.inf)
        self.device_LD = np.argsort(key_LD, axis=1, kind="stable")
        room_LD = np.take_along_axis(np.where(has_room_LD, self.level - load_LD, 0.0), self.device_LD, 1)
        # Room before each device of the list, every layer beginning where the one before cannot end: one ascending
        # line, in which one binary search finds places for all layers.
        line = np.empty((num_layers, num_devices + 1))
        line[:, 0] = self.layers.layer_L * (2 * self.level * num_devices)
        np.cumsum(room_LD, axis=1, out=line[:, 1:])
        line[:, 1:] += line[:, :1]
        self.line = line.ravel()
        self.end_L = has_room_LD.sum(axis=1) + self.layers.layer_L * (num_devices + 1)

    def run(self) -> Plan:
        """Let the givers of all layers give, those at the same place of every layer's list in one step."""
        layer_L, (num_layers, num_devices) = self.layers.layer_L, self.layers.load_LD.shape
        end_JL = np.empty((len(self.rows_JL) + 1, num_layers), dtype=np.int64)
        end_JL[0] = self.next_L
        found = []
        for place, (owner_L, rows_L) in enumerate(zip(self.owner_JL, self.rows_JL, strict=True)):
            waiting_L = self.waiting_L
            served_L = self._give(owner_L, rows_L)
            end_JL[place + 1] = self.next_L
            if served_L.any():
                served = np.flatnonzero(served_L)
                found.append((served, self.giver_LJ[served, place], waiting_L[served] - served * num_devices))
        # Each giver filled a run of the list of devices with room.
        run_LJ = np.diff(end_JL, axis=0).T
        filled_L = end_JL[-1] - end_JL[0]
        expert_R = np.repeat(self.giver_LJ.ravel(), run_LJ.ravel())
        device_R = self.device_LD[np.arange(num_devices) < filled_L[:, None]]
        found.append((np.repeat(layer_L, filled_L), expert_R, device_R))
        peak_L = self.load.reshape(num_layers, num_devices).max(axis=1)
        return Plan.gather(found, np.maximum(peak_L, np.where(filled_L > 0, self.level, 0.0)))

    def _give(self, owner_L: IntArray, rows_L: FloatArray) -> BoolArray:
        """Let one expert of every layer give what its owner has too much; true where a waiting device got some.

        Args:
            owner_L: Places of the owners in the list of loads.
            rows_L: What the experts have to give.
        """
        surplus_L = self.load.take(owner_L) - self.level
        may_L = (surplus_L > TINY) & (self.given_L < self.hot)
        surplus_L, left_L = surplus_L * may_L, rows_L * may_L

        # A waiting device comes first: filled where that is possible, else given what the owner has too much.
        served_L = np.where(self.need_L <= left_L, self.need_L, np.minimum(left_L, surplus_L))
        self.load[self.waiting_L] += served_L
        self.need_L = self.need_L - served_L
        self.slots_left_L = self.slots_left_L - (served_L > 0)
        self.need_L *= (self.need_L > self.tolerance) & (self.slots_left_L > 0)

        start_L, before_L = self.next_L, self.line.take(self.next_L)
        wanted_L = np.maximum(surplus_L - served_L, 0.0) * (self.need_L == 0)
        self.next_L = self._until(before_L + wanted_L)
        given_L = self.line.take(self.next_L) - before_L
        cut_L = (
            given_L > left_L - served_L + TINY
        )  # the last device cannot be filled: then the owner keeps what is even
        if any_cut := cut_L.any():
            given_L = np.where(cut_L, np.minimum(wanted_L, left_L - served_L), given_L)
            self.next_L = self._until(before_L + given_L)
        self.load[owner_L] -= served_L + given_L
        self.given_L = self.given_L + ((served_L > 0) | (self.next_L > start_L))
        self._wait(owner_L, served_L + given_L - surplus_L, self.slots)
        if any_cut and self.slots > 1:
            layer_L, (_, num_devices) = self.layers.layer_L, self.device_LD.shape
            last_L = self.device_LD[layer_L, self.next_L - layer_L * (num_devices + 1) - 1] + layer_L * num_devices
            self._wait(last_L, (self.line.take(self.next_L) - before_L - given_L) * cut_L, self.slots - 1)
        return served_L > 0

    def _wait(self, place_L: IntArray, need_L: FloatArray, slots: int) -> None:
        """Let devices that need more than the tolerance wait to be filled by the next giver."""
        waits_L = need_L > self.tolerance
        if waits_L.any():
            self.waiting_L = np.where(waits_L, place_L, self.waiting_L)
            self.need_L = np.where(waits_L, need_L, self.need_L)
            self.slots_left_L = np.where(waits_L, slots, self.slots_left_L)

    def _until(self, room_L: FloatArray) -> IntArray:
        """How far the lists must be used up to have so much room in the line, or up to their ends."""
        next_L: IntArray = np.minimum(np.searchsorted(self.line, room_L - TINY), self.end_L)
        return next_L

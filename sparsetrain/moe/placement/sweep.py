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
    """State of the pass: per layer, how far the list of devices with room is used up, and who waits to be filled."""

    def __init__(self, layers: Layers, topology: Topology, slots: int, hot: int, tolerance: float) -> None:
        self.layers, self.slots, self.hot, self.tolerance = layers, slots, hot, tolerance
        self.level = 1 + tolerance
        self.load_LD = layers.load_LD.copy()
        self._list_givers()
        self._list_devices_with_room(topology)
        num_layers = len(layers.layer_L)
        self.next_L = np.zeros(num_layers, dtype=np.int64)
        self.given_L = np.zeros(num_layers, dtype=np.int64)  # experts with replicas so far
        # At most one device of a layer waits: an owner that gave too much, or one that an expert could not fill.
        self.waiting_L = np.zeros(num_layers, dtype=np.int64)
        self.need_L = np.zeros(num_layers)
        self.slots_left_L = np.zeros(num_layers, dtype=np.int64)

    def _list_givers(self) -> None:
        """Experts of overfull devices: the fullest device first, and of a device the hottest expert."""
        layers = self.layers
        by_load_LE = np.argsort(-layers.load_LE, axis=1, kind="stable")
        full_LE = np.take_along_axis(layers.load_LD, np.take_along_axis(layers.owners_LE, by_load_LE, 1), 1)
        by_device_LE = np.argsort(-full_LE, axis=1, kind="stable")
        self.giver_LE = np.take_along_axis(by_load_LE, by_device_LE, 1)
        self.num_givers = int((full_LE > self.level).sum(axis=1).max(initial=0))

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
        self.num_with_room_L = has_room_LD.sum(axis=1)
        key_LD = np.where(has_room_LD, rank_LD + load_LD / 2, np.inf)
        self.device_LD = np.argsort(key_LD, axis=1, kind="stable")
        room_LD = np.take_along_axis(np.where(has_room_LD, self.level - load_LD, 0.0), self.device_LD, 1)
        self.room_before_LD = np.zeros((num_layers, num_devices + 1))
        np.cumsum(room_LD, axis=1, out=self.room_before_LD[:, 1:])
        # The layers one after another on one ascending line, so that one binary search looks all of them up.
        self.offset_L = 2 * self.level * num_devices * self.layers.layer_L
        self.line = (self.room_before_LD + self.offset_L[:, None]).ravel()

    def run(self) -> Plan:
        """Let the givers of all layers give, those at the same place of every layer's list in one step."""
        num_layers, num_devices = self.load_LD.shape
        end_JL = np.zeros((self.num_givers + 1, num_layers), dtype=np.int64)
        found = []
        for place in range(self.num_givers):
            expert_L = self.giver_LE[:, place]
            waiting_L = self.waiting_L.copy()
            served_L = self._give(expert_L)
            found.append((self.layers.layer_L[served_L], expert_L[served_L], waiting_L[served_L]))
            end_JL[place + 1] = self.next_L
        # Each giver filled a run of the list of devices with room.
        run_LJ = np.diff(end_JL, axis=0).T
        layer_R = np.repeat(self.layers.layer_L, self.next_L)
        expert_R = np.repeat(self.giver_LE[:, : self.num_givers].ravel(), run_LJ.ravel())
        device_R = self.device_LD[np.arange(num_devices) < self.next_L[:, None]]
        found.append((layer_R, expert_R, device_R))
        filled_L = np.where(self.next_L > 0, self.level, 0.0)
        return Plan.gather(found, np.maximum(self.load_LD.max(axis=1), filled_L))

    def _give(self, expert_L: IntArray) -> BoolArray:
        """Let one expert of every layer give what its owner has too much; true where a waiting device got some."""
        layer_L, level, tolerance = self.layers.layer_L, self.level, self.tolerance
        owner_L = self.layers.owners_LE[layer_L, expert_L]
        may_L = (self.load_LD[layer_L, owner_L] > level + TINY) & (self.given_L < self.hot)
        surplus_L = np.where(may_L, self.load_LD[layer_L, owner_L] - level, 0.0)
        left_L = np.where(may_L, self.layers.load_LE[layer_L, expert_L], 0.0)

        served_L = self._serve_waiting(surplus_L, left_L)
        start_L, wanted_L = self.next_L, np.where(self.need_L == 0, np.maximum(surplus_L, 0.0), 0.0)
        end_L = self._end(start_L, wanted_L)
        given_L = self._room(start_L, end_L)
        cut_L = given_L > left_L  # the last device cannot be filled: then the owner keeps what is even
        given_L = np.where(cut_L, np.minimum(wanted_L, left_L), given_L)
        end_L = np.where(cut_L, self._end(start_L, given_L), end_L)
        short_L = np.where(cut_L, self._room(start_L, end_L) - given_L, 0.0)

        surplus_L -= given_L
        self.load_LD[layer_L[may_L], owner_L[may_L]] = level + surplus_L[may_L]
        self.given_L += served_L | (end_L > start_L)
        self.next_L = end_L
        self._wait(surplus_L < -tolerance, owner_L, -surplus_L, self.slots)
        if self.slots > 1:
            last_L = self.device_LD[layer_L, np.maximum(end_L - 1, 0)]
            self._wait(short_L > tolerance, last_L, short_L, self.slots - 1)
        return served_L

    def _serve_waiting(self, surplus_L: FloatArray, left_L: FloatArray) -> BoolArray:
        """Fill the waiting devices first; lowers the givers' surplus and rows in place."""
        given_L = np.where(self.need_L <= left_L, self.need_L, np.minimum(left_L, surplus_L))
        served_L = given_L > 0
        self.load_LD[self.layers.layer_L, self.waiting_L] += given_L
        surplus_L -= given_L
        left_L -= given_L
        self.need_L -= given_L
        self.slots_left_L -= served_L
        self.need_L[(self.need_L <= self.tolerance) | (self.slots_left_L == 0)] = 0.0
        return served_L

    def _wait(self, where_L: BoolArray, device_L: IntArray, need_L: FloatArray, slots: int) -> None:
        """Let devices wait to be filled by the next giver."""
        self.waiting_L = np.where(where_L, device_L, self.waiting_L)
        self.need_L = np.where(where_L, need_L, self.need_L)
        self.slots_left_L = np.where(where_L, slots, self.slots_left_L)

    def _end(self, start_L: IntArray, rows_L: FloatArray) -> IntArray:
        """Where in the lists there is room for so many rows, beginning at `start_L`; their end if there is not."""
        first_L = self.room_before_LD[self.layers.layer_L, start_L]
        end_L: IntArray = np.searchsorted(self.line, first_L + rows_L + self.offset_L - TINY)
        end_L -= self.layers.layer_L * self.room_before_LD.shape[1]
        np.minimum(end_L, self.num_with_room_L, out=end_L)
        return end_L

    def _room(self, start_L: IntArray, end_L: IntArray) -> FloatArray:
        layer_L = self.layers.layer_L
        room_L: FloatArray = self.room_before_LD[layer_L, end_L] - self.room_before_LD[layer_L, start_L]
        return room_L

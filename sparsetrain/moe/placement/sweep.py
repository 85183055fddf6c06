"""Top devices with room up to the mean, in one pass over the experts of overfull devices, all layers at once.

Walker's alias method shows that n bins of any content are made even by pouring into each from one other bin. Here: a
device with room is filled by one expert of an overfull device, and an overfull device that gave too much is filled in
turn by the next. So one spare slot a device suffices, as long as single experts are large enough. Both sides are taken
in fixed orders, so each expert fills a run of devices.

Where every overfull device's hottest expert has all the rows that its device is to give, the ends of all runs follow
from sums, at once: the first givers' surplus together, laid along the room of the devices in their order. Layers where
one has too few are gone through expert by expert.
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
    level = 1 + tolerance
    plan, has_too_few_L = _all_at_once(_Lists(load_LE, owners_LE, topology, level), hot)
    stepwise = np.flatnonzero(has_too_few_L)
    if not len(stepwise):
        return plan
    lists = _Lists(load_LE[stepwise], owners_LE[stepwise], topology, level)
    return plan.with_layers(stepwise, _Stepwise(lists, slots, hot, tolerance).run())


class _Lists:
    """Who gives and who takes, in which order.

    Lists of all layers lie one after another: loads of devices, [L · D] flat, and the line of room, [L · (D + 1)] flat.
    """

    def __init__(self, load_LE: FloatArray, owners_LE: IntArray, topology: Topology, level: float) -> None:
        self.layers, self.level = Layers(load_LE, owners_LE, topology.num_devices), level
        self._list_givers()
        self._list_room(topology)

    def _list_givers(self) -> None:
        """Experts of overfull devices: the fullest device first, and of a device the hottest expert."""
        layers, num_devices = self.layers, self.layers.load_LD.shape[1]
        order_LE = np.argsort(-layers.load_LE, axis=1, kind="stable")
        for key_LE in (layers.owners_LE, -np.take_along_axis(layers.load_LD, layers.owners_LE, 1)):
            sorted_LE = np.take_along_axis(key_LE, order_LE, 1)
            order_LE = np.take_along_axis(order_LE, np.argsort(sorted_LE, axis=1, kind="stable"), 1)
        full_LE = np.take_along_axis(layers.load_LD, np.take_along_axis(layers.owners_LE, order_LE, 1), 1)
        num_givers = int((full_LE > self.level + TINY).sum(axis=1).max(initial=0))
        self.giver_LJ = order_LE[:, :num_givers]
        self.owner_LJ = np.take_along_axis(layers.owners_LE, self.giver_LJ, 1) + layers.layer_L[:, None] * num_devices
        self.rows_LJ = np.take_along_axis(layers.load_LE, self.giver_LJ, 1)

    def _list_room(self, topology: Topology) -> None:
        """The emptiest device of each node, then the second of each: so that an expert's replicas spread over nodes."""
        load_LD, layer_L = self.layers.load_LD, self.layers.layer_L
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
        line[:, 0] = layer_L * (2 * self.level * num_devices)
        np.cumsum(room_LD, axis=1, out=line[:, 1:])
        line[:, 1:] += line[:, :1]
        self.line = line.ravel()
        self.begin_L = layer_L * (num_devices + 1)
        self.end_L = self.begin_L + has_room_LD.sum(axis=1)

    def plan(self, end_LJ: IntArray, late: list[tuple[IntArray, IntArray, IntArray]], load: FloatArray) -> Plan:
        """The plan in which giver j fills the list of room up to `end_LJ[:, j]`, and others got replicas besides.

        Args:
            end_LJ: int64 [L, J], places in the line.
            late: Layers, experts and devices of replicas on devices that had to wait.
            load: float64 [L · D], loads of overfull devices after giving.
        """
        layer_L, (num_layers, num_devices) = self.layers.layer_L, self.layers.load_LD.shape
        run_LJ = np.diff(end_LJ, axis=1, prepend=self.begin_L[:, None])
        filled_L = run_LJ.sum(axis=1)
        expert_R = np.repeat(self.giver_LJ.ravel(), run_LJ.ravel())
        device_R = self.device_LD[np.arange(num_devices) < filled_L[:, None]]
        peak_L = load.reshape(num_layers, num_devices).max(axis=1)
        return Plan.gather(
            [(np.repeat(layer_L, filled_L), expert_R, device_R), *late],
            np.maximum(peak_L, np.where(filled_L > 0, self.level, 0.0)),
        )


def _all_at_once(lists: _Lists, hot: int) -> tuple[Plan, BoolArray]:
    """Let the hottest expert of each overfull device give all that it has too much.

    Returns:
        The plan, and in which layers it cannot be: where an expert has too few rows for it.
    """
    num_devices = lists.layers.load_LD.shape[1]
    load = lists.layers.load_LD.ravel().copy()
    is_first_LJ = np.diff(lists.owner_LJ, axis=1, prepend=-1) != 0
    surplus_LJ = np.maximum(load[lists.owner_LJ] - lists.level, 0.0) * is_first_LJ
    surplus_LJ *= np.cumsum(is_first_LJ, axis=1) <= hot
    gives_LJ = surplus_LJ > TINY

    # What a giver gives beyond its surplus to fill a device whole, the next one gives back to it: so all of them
    # together have filled devices up to the sum of their surplus, and the last of them waits for the rest.
    used_LJ = lists.line[lists.begin_L, None] + np.cumsum(surplus_LJ, axis=1)
    end_LJ = np.minimum(np.searchsorted(lists.line, used_LJ - TINY), lists.end_L[:, None])
    room_LJ = lists.line[end_LJ]
    waits_LJ = np.maximum(room_LJ - used_LJ, 0.0)
    before_LJ, served_LJ = np.empty_like(room_LJ), np.zeros_like(room_LJ)
    before_LJ[:, :1], before_LJ[:, 1:] = lists.line[lists.begin_L, None], room_LJ[:, :-1]
    served_LJ[:, 1:] = waits_LJ[:, :-1]
    served_LJ *= gives_LJ
    given_LJ = served_LJ + (room_LJ - before_LJ)

    layer, place = np.nonzero(served_LJ > TINY)
    last_LJ = np.maximum.accumulate(np.where(gives_LJ, np.arange(gives_LJ.shape[1]), 0), axis=1)
    waiting = lists.owner_LJ[layer, last_LJ[layer, place - 1]] - layer * num_devices
    load[lists.owner_LJ[gives_LJ]] -= given_LJ[gives_LJ]
    late = [(layer, lists.giver_LJ[layer, place], waiting)]
    return lists.plan(end_LJ, late, load), (given_LJ > lists.rows_LJ + TINY).any(axis=1)


class _Stepwise:
    """State of the pass expert by expert: how far a layer's list of room is used up, and who waits to be filled.

    The arrays of a step are as short as there are layers, so what counts is the number of calls.
    """

    def __init__(self, lists: _Lists, slots: int, hot: int, tolerance: float) -> None:
        self.lists, self.slots, self.hot, self.tolerance = lists, slots, hot, tolerance
        self.load = lists.layers.load_LD.ravel().copy()
        self.next_L = lists.begin_L
        self.given_L = np.zeros_like(self.next_L)  # experts with replicas so far
        # At most one device of a layer waits: an owner that gave too much, or one that an expert could not fill.
        self.waiting_L = np.zeros_like(self.next_L)
        self.need_L = np.zeros(len(self.next_L))
        self.slots_left_L = np.zeros_like(self.next_L)

    def run(self) -> Plan:
        """Let the givers of all layers give, those at the same place of every layer's list in one step."""
        lists, num_devices = self.lists, self.lists.layers.load_LD.shape[1]
        end_LJ, late = np.empty_like(lists.giver_LJ), []
        for place in range(end_LJ.shape[1]):
            waiting_L = self.waiting_L
            served = np.flatnonzero(self._give(lists.owner_LJ[:, place], lists.rows_LJ[:, place]))
            end_LJ[:, place] = self.next_L
            late.append((served, lists.giver_LJ[served, place], waiting_L[served] - served * num_devices))
        return lists.plan(end_LJ, late, self.load)

    def _give(self, owner_L: IntArray, rows_L: FloatArray) -> BoolArray:
        """Let one expert of every layer give what its owner has too much; true where a waiting device got some.

        Args:
            owner_L: Places of the owners in the list of loads.
            rows_L: What the experts have to give.
        """
        lists = self.lists
        surplus_L = self.load[owner_L] - lists.level
        may_L = (surplus_L > TINY) & (self.given_L < self.hot)
        surplus_L, left_L = surplus_L * may_L, rows_L * may_L

        # A waiting device comes first: filled where that is possible, else given what the owner has too much.
        served_L = np.where(self.need_L <= left_L, self.need_L, np.minimum(left_L, surplus_L))
        self.load[self.waiting_L] += served_L
        self.need_L = self.need_L - served_L
        self.slots_left_L = self.slots_left_L - (served_L > 0)
        self.need_L *= (self.need_L > self.tolerance) & (self.slots_left_L > 0)

        start_L, before_L = self.next_L, lists.line[self.next_L]
        wanted_L = np.maximum(surplus_L - served_L, 0.0) * (self.need_L == 0)
        self.next_L = self._until(before_L + wanted_L)
        given_L = lists.line[self.next_L] - before_L
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
            layer_L, num_devices = lists.layers.layer_L, lists.device_LD.shape[1]
            last_L = lists.device_LD[layer_L, self.next_L - lists.begin_L - 1] + layer_L * num_devices
            self._wait(last_L, (lists.line[self.next_L] - before_L - given_L) * cut_L, self.slots - 1)
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
        next_L: IntArray = np.minimum(np.searchsorted(self.lists.line, room_L - TINY), self.lists.end_L)
        return next_L

"""How many rows each holder of an expert takes: a flow from overfull devices to those with room.

The split starts as the paper's (arXiv 2502.02581), which crosses nodes as little as the placement allows, and moves
rows from every device above a capacity along paths of replicas: an expert's rows go from one holder to another, which
may in turn hand on rows of another expert. Paths inside a node are taken before paths across. When no path is left, the
devices that the overfull ones can reach share more rows than they have room for: the capacity rises to their mean, and
no split can stay below that. So the fullest device ends at the capacity asked for or at the least possible maximum.
"""

from itertools import pairwise

import numpy as np

from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.topology import FloatArray, IntArray, Topology


def capacity_split(counts_ES: IntArray, placement: Placement, topology: Topology, cross_node_cost: float) -> IntArray:
    """Rows of each (expert, holder) pair, with no device fuller than the capacity or the least possible maximum.

    The capacity is (1 + cross_node_cost) · mean load, rounded up.

    Args:
        counts_ES: int64 [E, S], rows of each source for each expert.
        placement: Who holds what.
        topology: Where the devices stand.
        cross_node_cost: Share of the mean load; up to this much above it no row is moved to another node.

    Returns:
        int64 [P], at least 0; over an expert's holders they sum to its rows exactly.
    """
    rows_P = _round(near_split(counts_ES, placement, topology), counts_ES.sum(axis=1), placement.expert_P)
    load_D = loads(rows_P, placement)
    capacity = int(np.ceil(load_D.sum() * (1 + cross_node_cost) / len(load_D)))
    if load_D.max() <= capacity:
        return rows_P
    return _Flow(rows_P, load_D, placement, topology).limit(capacity)


def loads(rows_P: IntArray, placement: Placement) -> IntArray:
    """int64 [D], rows of each device, from those of its pairs."""
    return np.bincount(placement.device_P, rows_P, placement.num_devices).astype(np.int64)


def near_split(counts_ES: IntArray, placement: Placement, topology: Topology) -> FloatArray:
    """What each pair takes by the paper's dispatch, before rounding: float64 [P]."""
    expert_P, device_P, first_N = placement.expert_P, placement.device_P, topology.first_of_node_N
    away_EN = np.add.reduceat(np.where(placement.holders_ED, 0, counts_ES), first_N, axis=1)
    holders_EN = np.add.reduceat(placement.holders_ED, first_N, axis=1, dtype=np.int64)
    share_EN = away_EN / np.maximum(holders_EN, 1)
    far_E = np.where(holders_EN == 0, away_EN, 0).sum(axis=1) / holders_EN.sum(axis=1)
    near_P: FloatArray = counts_ES[expert_P, device_P] + share_EN[expert_P, topology.node_D[device_P]] + far_E[expert_P]
    return near_P


class _Flow:
    """Rows of pairs and loads of devices, as lists: paths are short, and numpy would cost more than it saves."""

    def __init__(self, rows_P: IntArray, load_D: IntArray, placement: Placement, topology: Topology) -> None:
        """Take the pairs of experts with several holders; the others' rows have nowhere to go."""
        expert_P, device_P = placement.expert_P, placement.device_P
        place_P = np.flatnonzero(np.bincount(expert_P)[expert_P] > 1)
        expert_P, device_P = expert_P[place_P], device_P[place_P]
        self.all_rows_P, self.place_P = rows_P, place_P
        self.rows: list[int] = rows_P[place_P].tolist()
        self.load: list[int] = load_D.tolist()
        self.device: list[int] = device_P.tolist()
        # Runs of pairs: the holders of an expert, and those of them that stand in one node.
        self.expert, self.holders = _runs(expert_P)
        self.group, self.holders_in_node = _runs(expert_P * topology.num_nodes + topology.node_D[device_P])
        self.pairs: list[list[int]] = [[] for _ in self.load]
        for pair, device in enumerate(self.device):
            self.pairs[device].append(pair)

    def limit(self, capacity: int) -> IntArray:
        """Move rows until no device is above the capacity, raising it where it cannot be kept."""
        load = self.load
        # The least overfull first: it finds room nearby, and those that have to go far find what is left.
        for start in sorted((device for device, rows in enumerate(load) if rows > capacity), key=load.__getitem__):
            while load[start] > capacity:
                moved, reached = self._relieve(start, capacity)
                if not moved:
                    capacity = -(-sum(load[device] for device in reached) // len(reached))
        rows_P = self.all_rows_P.copy()
        rows_P[self.place_P] = self.rows
        return rows_P

    def _relieve(self, start: int, capacity: int) -> tuple[bool, list[int]]:
        """Search from an overfull device, nodes first, and fill every device with room when it is reached.

        Returns:
            Whether any row moved, and the devices that were reached: all there are, if none did.
        """
        rows, load, device, group, expert = self.rows, self.load, self.device, self.group, self.expert
        # How a device was reached: the pair that hands rows on to it, and its own pair that takes them.
        giver_to, taker_at = [-1] * len(load), [-1] * len(load)
        giver_to[start] = 0
        queue, far, position, position_far = [start], list[int](), 0, 0
        left_group, left_expert = [False] * len(self.holders_in_node), [False] * len(self.holders)
        moved = False
        while True:
            if position < len(queue):
                here = queue[position]
                position += 1
                if load[here] < capacity:
                    most = min(load[start] - capacity, capacity - load[here])
                    moved |= self._carry(start, here, giver_to, taker_at, most)
                    if load[start] <= capacity:
                        return moved, queue
                leaving = []
                for giver in self.pairs[here]:
                    if rows[giver]:
                        if not left_group[group[giver]]:
                            left_group[group[giver]] = True
                            leaving.append((giver, self.holders_in_node[group[giver]]))
                        if not left_expert[expert[giver]]:
                            left_expert[expert[giver]] = True
                            far.append(giver)
            elif position_far < len(far):  # nothing more can be reached inside nodes
                leaving = [(far[position_far], self.holders[expert[far[position_far]]])]
                position_far += 1
            else:
                return moved, queue
            for giver, takers in leaving:
                for taker in takers:
                    there = device[taker]
                    if giver_to[there] < 0:
                        giver_to[there] = giver
                        taker_at[there] = taker
                        queue.append(there)

    def _carry(self, start: int, end: int, giver_to: list[int], taker_at: list[int], most: int) -> bool:
        """Move up to so many rows along a path, as many as every giver on it has; true if that is any."""
        rows, device = self.rows, self.device
        here = end
        while here != start:
            giver = giver_to[here]
            if rows[giver] < most:
                most = rows[giver]
            here = device[giver]
        here = end
        while here != start:
            giver = giver_to[here]
            rows[giver] -= most
            rows[taker_at[here]] += most
            here = device[giver]
        self.load[start] -= most
        self.load[end] += most
        return most > 0


def _runs(key_P: IntArray) -> tuple[list[int], list[range]]:
    """Number the runs of equal keys: the run of each pair, and the pairs of each run."""
    starts = np.flatnonzero(np.diff(key_P, prepend=-1))
    run_P = np.zeros(len(key_P), dtype=np.int64)
    run_P[starts[1:]] = 1
    bounds = [*starts.tolist(), len(key_P)]
    return np.cumsum(run_P).tolist(), [range(*pair) for pair in pairwise(bounds)]


def _round(split_P: FloatArray, load_E: IntArray, expert_P: IntArray) -> IntArray:
    """Whole rows, with exact sums per expert: rounded down, and what is missing given to its first holders."""
    first_E = np.flatnonzero(np.diff(expert_P, prepend=-1))
    rows_P = split_P.astype(np.int64)
    missing_E = load_E - np.add.reduceat(rows_P, first_E)
    rows_P += np.arange(len(expert_P)) - first_E[expert_P] < missing_E[expert_P]
    return rows_P

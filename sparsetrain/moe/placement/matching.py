"""Which source's rows go to which holder: evenly, as the paper has it, or matched to what each holder is to take.

A rank needs the rows that it sends and those that it receives, not everybody's: `rows` works them out for the pairs and
sources that are asked for. Arrays are laid out [E, S], experts first.
"""

from functools import cached_property
from typing import Protocol

import numpy as np

from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.topology import IntArray, Topology


class Deliveries(Protocol):
    """Rows of every source for every (expert, holder) pair of a placement."""

    @property
    def rows_P(self) -> IntArray:
        """int64 [P], rows of each pair from all sources."""

    @property
    def crossing(self) -> int:
        """Rows whose source and holder stand in different nodes."""

    def rows(self, pairs: IntArray, sources: IntArray) -> IntArray:
        """int64 [len(pairs), len(sources)], rows of some sources for some pairs."""


class EvenDeliveries:
    """The paper's dispatch (arXiv 2502.02581): to the own replica, else evenly in the node, else evenly to all.

    What does not divide evenly goes to the holders in turn, beginning with another one at every source.

    Args:
        counts_ES: int64 [E, S], rows of each source for each expert.
        placement: Who holds what.
        topology: Where the devices stand.
    """

    def __init__(self, counts_ES: IntArray, placement: Placement, topology: Topology) -> None:
        self.counts_ES, self.placement, self.node_D = counts_ES, placement, topology.node_D
        expert_P, device_P = placement.expert_P, placement.device_P
        self.holders_EN = np.add.reduceat(placement.holders_ED, topology.first_of_node_N, axis=1, dtype=np.int64)
        self.holders_E = self.holders_EN.sum(axis=1)
        # A pair's place among the holders of its expert, and among those in its node.
        self.place_P = np.arange(len(expert_P)) - (np.cumsum(self.holders_E) - self.holders_E)[expert_P]
        before_EN = np.cumsum(self.holders_EN, axis=1) - self.holders_EN
        self.place_in_node_P = self.place_P - before_EN[expert_P, self.node_D[device_P]]

    def rows(self, pairs: IntArray, sources: IntArray) -> IntArray:
        """int64 [len(pairs), len(sources)], rows of some sources for some pairs."""
        expert_P, device_P = self.placement.expert_P[pairs, None], self.placement.device_P[pairs, None]
        counts_PS, in_node_PS = self.counts_ES[expert_P, sources], self.holders_EN[expert_P, self.node_D[sources]]
        has_node_PS = in_node_PS > 0
        targets_PS = np.where(has_node_PS, in_node_PS, self.holders_E[expert_P])
        place_PS = np.where(has_node_PS, self.place_in_node_P[pairs, None], self.place_P[pairs, None])
        share_PS, rest_PS = np.divmod(counts_PS, targets_PS)
        share_PS += (place_PS - sources) % targets_PS < rest_PS
        share_PS[has_node_PS & (self.node_D[device_P] != self.node_D[sources])] = 0
        local_PS = np.where(device_P == sources, counts_PS, 0)
        return np.where(self.placement.holders_ED[expert_P, sources], local_PS, share_PS)

    @cached_property
    def rows_P(self) -> IntArray:
        """int64 [P], rows of each pair from all sources."""
        rows_P: IntArray = self._rows_PS.sum(axis=1)
        return rows_P

    @cached_property
    def crossing(self) -> int:
        """Rows whose source and holder stand in different nodes."""
        return int(self._rows_PS[self.node_D[self.placement.device_P, None] != self.node_D].sum())

    @cached_property
    def _rows_PS(self) -> IntArray:
        return self.rows(np.arange(len(self.place_P)), np.arange(self.placement.num_devices))


class MatchedDeliveries:
    """Sources matched to holders that take given numbers of rows: local rows first, then the node's, then across.

    Within a node, and across nodes, sources and holders lie side by side on a line, each as long as its rows; a source
    sends to a holder what overlaps.

    Args:
        counts_ES: int64 [E, S], rows of each source for each expert.
        rows_P: int64 [P], rows that each pair takes; over the holders of an expert they sum to the rows of its sources.
        placement: Who holds what.
        topology: Where the devices stand.
    """

    def __init__(self, counts_ES: IntArray, rows_P: IntArray, placement: Placement, topology: Topology) -> None:
        self.rows_P, self.placement = rows_P, placement
        expert_P, device_P = placement.expert_P, placement.device_P
        self.local_P = np.minimum(counts_ES[expert_P, device_P], rows_P)
        source_ES, taken_ED = counts_ES.copy(), np.zeros_like(counts_ES)
        source_ES[expert_P, device_P] -= self.local_P
        taken_ED[expert_P, device_P] = rows_P - self.local_P

        first_N, node_D = topology.first_of_node_N, topology.node_D
        length_EN = np.minimum(np.add.reduceat(source_ES, first_N, axis=1), np.add.reduceat(taken_ED, first_N, axis=1))
        offset_EN = np.cumsum(length_EN, axis=1) - length_EN
        cut = (length_EN.take(node_D, axis=1), offset_EN.take(node_D, axis=1), topology)
        near_source, near_taken = _lines_of_nodes(source_ES, *cut), _lines_of_nodes(taken_ED, *cut)
        source_ES -= near_source[1] - near_source[0]
        taken_ED -= near_taken[1] - near_taken[0]
        self.crossing = int(source_ES.sum())
        self._lines = [(near_source, near_taken), (_lines(source_ES), _lines(taken_ED))]

    def rows(self, pairs: IntArray, sources: IntArray) -> IntArray:
        """int64 [len(pairs), len(sources)], rows of some sources for some pairs."""
        expert_P, device_P = self.placement.expert_P[pairs, None], self.placement.device_P[pairs, None]
        rows_PS: IntArray = np.where(device_P == sources, self.local_P[pairs, None], 0)
        for source, taken in self._lines:
            start_PS = np.maximum(source[0][expert_P, sources], taken[0][expert_P, device_P])
            end_PS = np.minimum(source[1][expert_P, sources], taken[1][expert_P, device_P])
            rows_PS += np.maximum(end_PS - start_PS, 0)
        return rows_PS


_Lines = tuple[IntArray, IntArray]
"""Where the rows of each source or holder of an expert begin and end, int64 [E, D] each."""


def _lines(rows_ED: IntArray) -> _Lines:
    end_ED = np.cumsum(rows_ED, axis=1)
    return end_ED - rows_ED, end_ED


def _lines_of_nodes(rows_ED: IntArray, length_ED: IntArray, offset_ED: IntArray, topology: Topology) -> _Lines:
    """Lay the nodes' lines one after another, each cut to the length that its sources and its holders both have."""
    start_ED, end_ED = _lines(rows_ED)
    before_ED = start_ED.take(topology.first_of_node_N[topology.node_D], axis=1)
    return (
        np.minimum(start_ED - before_ED, length_ED) + offset_ED,
        np.minimum(end_ED - before_ED, length_ED) + offset_ED,
    )

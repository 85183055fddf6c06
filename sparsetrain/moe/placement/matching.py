"""Which source's rows go to which holder: the paper's even split, and the matching to given totals of the holders.

Arrays here are laid out [E, S] and [P, S], experts and pairs first, so that the rows of a pair's expert are one stretch
of memory.
"""

import numpy as np

from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.topology import IntArray, Topology


def even_split(counts_ES: IntArray, placement: Placement, topology: Topology) -> IntArray:
    """The paper's dispatch (arXiv 2502.02581): to the own replica, else evenly in the node, else evenly to all.

    What does not divide evenly goes to the holders in turn, beginning with another one at every source.

    Returns:
        int64 [P, S], rows of each source for each pair of the placement.
    """
    expert_P, device_P, node_D = placement.expert_P, placement.device_P, topology.node_D
    device_S = np.arange(placement.num_devices)
    holders_EN = np.add.reduceat(placement.holders_ED, topology.first_of_node_N, axis=1, dtype=np.int64)
    holders_E = holders_EN.sum(axis=1)
    # A pair's place among the holders of its expert, and among those in its node.
    place_P = np.arange(len(expert_P)) - (np.cumsum(holders_E) - holders_E)[expert_P]
    place_in_node_P = place_P - (np.cumsum(holders_EN, axis=1) - holders_EN)[expert_P, node_D[device_P]]

    in_node_PS = holders_EN[:, node_D][expert_P]
    targets_PS = np.where(in_node_PS > 0, in_node_PS, holders_E[expert_P, None])
    share_PS, rest_PS = np.divmod(counts_ES[expert_P], targets_PS)
    turn_PS = (np.where(in_node_PS > 0, place_in_node_P[:, None], place_P[:, None]) - device_S) % targets_PS
    is_target_PS = (in_node_PS == 0) | (node_D[device_P, None] == node_D)
    rows_PS = np.where(is_target_PS, share_PS + (turn_PS < rest_PS), 0)
    rows_PS[placement.holders_ED[expert_P]] = 0
    rows_PS[np.arange(len(expert_P)), device_P] = counts_ES[expert_P, device_P]
    return rows_PS


def match_sources(counts_ES: IntArray, rows_P: IntArray, placement: Placement, topology: Topology) -> IntArray:
    """Assign sources to holders that take given numbers of rows: local rows first, then the node's, then across.

    Within a node, and across nodes, sources and holders lie side by side on a line, each as long as its rows; a source
    sends to a holder what overlaps.

    Args:
        counts_ES: int64 [E, S], rows of each source for each expert.
        rows_P: int64 [P], rows that each pair takes; over the holders of an expert they sum to the rows of its sources.
        placement: Who holds what.
        topology: Where the devices stand.

    Returns:
        int64 [P, S].
    """
    expert_P, device_P = placement.expert_P, placement.device_P
    local_P = np.minimum(counts_ES[expert_P, device_P], rows_P)
    source_ES, taken_ED = counts_ES.copy(), np.zeros_like(counts_ES)
    source_ES[expert_P, device_P] -= local_P
    taken_ED[expert_P, device_P] = rows_P - local_P

    first_N, node_D = topology.first_of_node_N, topology.node_D
    length_EN = np.minimum(np.add.reduceat(source_ES, first_N, axis=1), np.add.reduceat(taken_ED, first_N, axis=1))
    offset_EN = np.cumsum(length_EN, axis=1) - length_EN
    cut = (length_EN.take(node_D, axis=1), offset_EN.take(node_D, axis=1), topology)
    near_source, near_taken = _lines_of_nodes(source_ES, *cut), _lines_of_nodes(taken_ED, *cut)
    rows_PS = _overlap(near_source, near_taken, placement)
    source_ES -= near_source[1] - near_source[0]
    taken_ED -= near_taken[1] - near_taken[0]
    rows_PS += _overlap(_lines(source_ES), _lines(taken_ED), placement)
    rows_PS[np.arange(len(expert_P)), device_P] += local_P
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


def _overlap(source: _Lines, taken: _Lines, placement: Placement) -> IntArray:
    """Rows of each source on the stretch of each pair, int64 [P, S]."""
    expert_P, device_P = placement.expert_P, placement.device_P
    start_PS = np.maximum(source[0].take(expert_P, axis=0), taken[0][expert_P, device_P, None])
    end_PS = np.minimum(source[1].take(expert_P, axis=0), taken[1][expert_P, device_P, None])
    end_PS -= start_PS
    return np.maximum(end_PS, 0, out=end_PS)

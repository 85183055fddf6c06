"""Which source's rows go to which holder: the paper's even split, and the matching to given totals of the holders."""

import numpy as np

from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.topology import IntArray, Topology


def even_split(counts_SE: IntArray, placement: Placement, topology: Topology) -> IntArray:
    """The paper's dispatch: to the own replica, else evenly to those in the node, else evenly to all.

    What does not divide evenly goes to the holders in turn, beginning with another one at every source.

    Returns:
        int64 [S, P], rows of each source for each pair of the placement.
    """
    expert_P, device_P = placement.expert_P, placement.device_P
    node_D = topology.node_D
    holders_EN = np.add.reduceat(placement.holders_ED, topology.first_of_node_N, axis=1, dtype=np.int64)
    before_EN = np.cumsum(holders_EN, axis=1) - holders_EN
    first_E = np.cumsum(holders_EN.sum(axis=1)) - holders_EN.sum(axis=1)
    place_P = np.arange(len(expert_P)) - first_E[expert_P]  # among all holders of the expert

    own_SP = placement.holders_ED.T[:, expert_P]
    in_node_SP = holders_EN.T[node_D][:, expert_P]
    near_SP = node_D[:, None] == node_D[device_P]
    targets_SP = np.where(in_node_SP > 0, in_node_SP, holders_EN.sum(axis=1)[expert_P])
    # A holder's place among the targets: among all, or among those in its node when these are the targets.
    place_SP = np.where(in_node_SP > 0, place_P - before_EN[expert_P, node_D[device_P]], place_P)
    turn_SP = (place_SP - np.arange(len(node_D))[:, None]) % targets_SP
    share_SP, rest_SP = np.divmod(counts_SE[:, expert_P], targets_SP)
    even_SP = np.where(near_SP | (in_node_SP == 0), share_SP + (turn_SP < rest_SP), 0)
    home_SP = np.where(device_P == np.arange(len(node_D))[:, None], counts_SE[:, expert_P], 0)
    return np.where(own_SP, home_SP, even_SP)


def match_sources(counts_SE: IntArray, rows_P: IntArray, placement: Placement, topology: Topology) -> IntArray:
    """Assign sources to holders that take given numbers of rows: local rows first, then the node's, then across.

    Within a node, and across nodes, sources and holders lie side by side on a line, each as long as its rows; a source
    sends to a holder what overlaps.

    Args:
        counts_SE: int64 [S, E].
        rows_P: int64 [P], rows that each pair takes; over the holders of an expert they sum to the rows of its sources.
        placement: Who holds what.
        topology: Where the devices stand.

    Returns:
        int64 [S, P].
    """
    expert_P, device_P = placement.expert_P, placement.device_P
    local_P = np.minimum(counts_SE[device_P, expert_P], rows_P)
    source_SE = counts_SE.copy()
    source_SE[device_P, expert_P] -= local_P
    taken_DE = np.zeros_like(counts_SE)
    taken_DE[device_P, expert_P] = rows_P - local_P

    node_D, first_N = topology.node_D, topology.first_of_node_N
    length_NE = np.minimum(np.add.reduceat(source_SE, first_N, axis=0), np.add.reduceat(taken_DE, first_N, axis=0))
    length_SE, offset_SE = length_NE[node_D], (np.cumsum(length_NE, axis=0) - length_NE)[node_D]
    near_source = _line_of_nodes(source_SE, length_SE, offset_SE, topology)
    near_taken = _line_of_nodes(taken_DE, length_SE, offset_SE, topology)
    far_source = _line(source_SE - (near_source[1] - near_source[0]))
    far_taken = _line(taken_DE - (near_taken[1] - near_taken[0]))
    rows_SP = _overlap(near_source, near_taken, placement) + _overlap(far_source, far_taken, placement)
    rows_SP[device_P, np.arange(len(expert_P))] += local_P
    return rows_SP


_Line = tuple[IntArray, IntArray]
"""Where each source's or holder's rows of an expert begin and end, int64 [D, E] each."""


def _line(rows_DE: IntArray) -> _Line:
    end_DE = np.cumsum(rows_DE, axis=0)
    return end_DE - rows_DE, end_DE


def _line_of_nodes(rows_DE: IntArray, length_DE: IntArray, offset_DE: IntArray, topology: Topology) -> _Line:
    """Lay the nodes' lines one after another, each cut to the length that its sources and its holders both have."""
    start_DE, end_DE = _line(rows_DE)
    before_DE = start_DE[topology.first_of_node_N][topology.node_D]
    return (
        offset_DE + np.minimum(start_DE - before_DE, length_DE),
        offset_DE + np.minimum(end_DE - before_DE, length_DE),
    )


def _overlap(source: _Line, taken: _Line, placement: Placement) -> IntArray:
    """Rows of each source on the stretch of each pair, int64 [S, P]."""
    expert_P, device_P = placement.expert_P, placement.device_P
    start_SP = np.maximum(source[0][:, expert_P], taken[0][device_P, expert_P])
    end_SP = np.minimum(source[1][:, expert_P], taken[1][device_P, expert_P])
    rows_SP: IntArray = np.maximum(end_SP - start_SP, 0)
    return rows_SP

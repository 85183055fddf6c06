"""Which device computes which rows: the split of every (source rank, expert) row count among the expert's holders."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal

import numpy as np

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.matching import even_split, match_sources
from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.splitting import capacity_split
from sparsetrain.moe.placement.topology import IntArray, Topology

DispatchMethod = Literal["capacity", "paper"]


@dataclass(frozen=True, eq=False)
class Dispatch:
    """The rows that each source sends to each holder of each expert; the same object on every rank.

    Args:
        placement: Who holds what.
        topology: Where the devices stand; sources are the same devices.
        rows_PS: int64 [P, S], rows of source s that go to pair p, in the order of `placement.expert_P`/`device_P`.
    """

    placement: Placement
    topology: Topology
    rows_PS: IntArray

    def sent_by(self, source: int) -> IntArray:
        """int64 [E, D]: rows of a source for expert e that go to device d."""
        rows_ED = np.zeros((self.placement.num_experts, self.placement.num_devices), dtype=np.int64)
        rows_ED[self.placement.expert_P, self.placement.device_P] = self.rows_PS[:, source]
        return rows_ED

    def received_by(self, device: int) -> IntArray:
        """int64 [S, E]: rows that a device gets from source s for expert e."""
        rows_SE = np.zeros((self.rows_PS.shape[1], self.placement.num_experts), dtype=np.int64)
        pairs = np.flatnonzero(self.placement.device_P == device)
        rows_SE[:, self.placement.expert_P[pairs]] = self.rows_PS[pairs].T
        return rows_SE

    @cached_property
    def load_D(self) -> IntArray:
        """int64 [D]: rows that each device computes."""
        load_D = np.zeros(self.placement.num_devices, dtype=np.int64)
        np.add.at(load_D, self.placement.device_P, self.rows_PS.sum(axis=1))
        return load_D

    @cached_property
    def crossing(self) -> int:
        """Rows whose source and device stand in different nodes."""
        node_D = self.topology.node_D
        return int(self.rows_PS[node_D[self.placement.device_P, None] != node_D].sum())

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that are equal for equal plans in every process, for comparing ranks' plans."""
        digest = blake2b(self.placement.fingerprint.to_bytes(8, "little"), digest_size=8)
        digest.update(np.ascontiguousarray(self.rows_PS).data)
        return int.from_bytes(digest.digest(), "little") >> 1


def dispatch(
    counts_SE: IntArray,
    placement: Placement,
    topology: Topology,
    *,
    method: DispatchMethod = "capacity",
    cross_node_cost: float = 0.02,
) -> Dispatch:
    """Split the rows of every source among the holders of their experts.

    `paper` (arXiv 2502.02581): to the source's own replica, else evenly to those in its node, else evenly to all.
    `capacity`: starts from the paper's split, which crosses nodes least, and changes it as little as an even load of
    the devices requires (`splitting`).

    Args:
        counts_SE: int64 [S, E], rows of each source rank for each expert; S = D.
        placement: Who holds what in this step.
        topology: Where the devices stand.
        method: `capacity` or `paper`.
        cross_node_cost: With `capacity`, how much fuller than the best achievable the fullest device may become where
            that spares a crossing between nodes, as a share of its load.

    Raises:
        PlacementError: Shapes do not agree, or the method is unknown.
    """
    expected = (topology.num_devices, placement.num_experts)
    if counts_SE.shape != expected or placement.num_devices != topology.num_devices:
        raise PlacementError(
            f"counts of shape {counts_SE.shape} and a placement on {placement.num_devices} devices do not fit "
            f"{topology.num_devices} devices: expected counts of shape {expected}"
        )
    counts_ES = np.ascontiguousarray(counts_SE.T, dtype=np.int64)
    if method == "paper":
        return Dispatch(placement, topology, even_split(counts_ES, placement, topology))
    if method == "capacity":
        rows_P = capacity_split(counts_ES, placement, topology, cross_node_cost)
        return Dispatch(placement, topology, match_sources(counts_ES, rows_P, placement, topology))
    raise PlacementError(f"dispatch method {method!r} is unknown; use 'capacity' or 'paper'")

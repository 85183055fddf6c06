"""Which device computes which rows: the split of every (source rank, expert) row count among the expert's holders."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal

import numpy as np

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement.matching import Deliveries, EvenDeliveries, MatchedDeliveries
from sparsetrain.moe.placement.placement import Placement
from sparsetrain.moe.placement.splitting import capacity_split, loads
from sparsetrain.moe.placement.topology import IntArray, Topology

DispatchMethod = Literal["capacity", "paper"]


@dataclass(frozen=True, eq=False)
class Dispatch:
    """The rows that each source sends to each holder of each expert; the same object on every rank.

    Args:
        counts_ES: int64 [E, S], rows of each source for each expert.
        placement: Who holds what.
        deliveries: How the rows are split.
    """

    counts_ES: IntArray
    placement: Placement
    deliveries: Deliveries

    def sent_by(self, source: int) -> IntArray:
        """int64 [E, D]: rows of a source for expert e that go to device d."""
        rows_ED = np.zeros((self.placement.num_experts, self.placement.num_devices), dtype=np.int64)
        pairs = np.arange(len(self.placement.expert_P))
        rows_ED[self.placement.expert_P, self.placement.device_P] = self.deliveries.rows(pairs, np.array([source]))[
            :, 0
        ]
        return rows_ED

    def received_by(self, device: int) -> IntArray:
        """int64 [S, E]: rows that a device gets from source s for expert e."""
        num_sources = self.counts_ES.shape[1]
        rows_SE = np.zeros((num_sources, self.placement.num_experts), dtype=np.int64)
        pairs = np.flatnonzero(self.placement.device_P == device)
        rows_SE[:, self.placement.expert_P[pairs]] = self.deliveries.rows(pairs, np.arange(num_sources)).T
        return rows_SE

    @cached_property
    def load_D(self) -> IntArray:
        """int64 [D]: rows that each device computes."""
        return loads(self.deliveries.rows_P, self.placement)

    @property
    def crossing(self) -> int:
        """Rows whose source and device stand in different nodes."""
        return self.deliveries.crossing

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that are equal for equal plans in every process, for comparing ranks' plans."""
        digest = blake2b(self.placement.fingerprint.to_bytes(8, "little"), digest_size=8)
        digest.update(self.counts_ES.data)
        digest.update(np.ascontiguousarray(self.deliveries.rows_P).data)
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
        return Dispatch(counts_ES, placement, EvenDeliveries(counts_ES, placement, topology))
    if method == "capacity":
        rows_P = capacity_split(counts_ES, placement, topology, cross_node_cost)
        return Dispatch(counts_ES, placement, MatchedDeliveries(counts_ES, rows_P, placement, topology))
    raise PlacementError(f"dispatch method {method!r} is unknown; use 'capacity' or 'paper'")

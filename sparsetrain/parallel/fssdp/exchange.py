"""The exchange of rows between the ranks of an expert group: what goes where, in which order, in how many chunks.

A device's slots (the experts that it owns, ascending, then its replicas, ascending) are cut into chunks. The rows of
one chunk travel while those of another are computed.

Shapes: P (expert, holder) pairs, S source ranks, R rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsetrain.moe.placement import Dispatch
from sparsetrain.moe.placement.topology import IntArray


@dataclass(frozen=True)
class Chunk:
    """The rows of a group of slots, as one rank sees them."""

    slots: slice
    """Which of this rank's slots compute them."""
    counts: list[int]
    """Rows of each of these slots."""
    sent: slice
    """Which of the rows that this rank sends, in the order of `Exchange.order_R`."""
    sent_to: list[int]
    """How many of them go to each rank."""
    received_from: list[int]
    """How many come from each rank."""
    by_slot: Tensor | None
    """int64, which of the received rows, sorted by source, is which when sorted by slot; None where they agree."""

    @property
    def num_received(self) -> int:
        """Rows that come here."""
        return sum(self.received_from)


@dataclass(frozen=True)
class Exchange:
    """One rank's part of a dispatch."""

    order_R: Tensor
    """int64: the rows of the routing, in the order in which they are sent."""
    chunks: list[Chunk]
    counts_E: list[int]
    """Rows of the routing for each expert."""

    @classmethod
    def of(cls, dispatch: Dispatch, rank: int, degree: int, device: torch.device) -> "Exchange":
        """The view of one rank, its slots cut into `degree` chunks; with fewer slots, chunks are empty."""
        expert_P, device_P = dispatch.placement.expert_P, dispatch.placement.device_P
        is_replica_P = dispatch.placement.owner_E[expert_P] != device_P
        by_slot_P = np.lexsort((expert_P, is_replica_P, device_P))
        slots_D = np.bincount(device_P, minlength=dispatch.placement.num_devices)
        slot_P = np.empty_like(expert_P)
        slot_P[by_slot_P] = np.arange(len(expert_P)) - np.repeat(np.cumsum(slots_D) - slots_D, slots_D)
        chunk_P = slot_P * degree // slots_D[device_P]

        sent_P = dispatch.deliveries.rows(np.arange(len(expert_P)), np.array([rank]))[:, 0]
        every_source = np.arange(len(slots_D))
        in_turn = np.lexsort((slot_P, device_P, chunk_P))
        # A rank's rows are sorted by expert; those of an expert go to its holders in turn: the order of pairs.
        order_R = _on(device, _ranges((np.cumsum(sent_P) - sent_P)[in_turn], sent_P[in_turn]))
        chunks, first = [], 0
        for chunk in range(degree):
            inside_P = chunk_P == chunk
            sent_to = np.bincount(device_P[inside_P], sent_P[inside_P], len(slots_D)).astype(np.int64)
            here = by_slot_P[(inside_P & (device_P == rank))[by_slot_P]]
            end = first + int(sent_to.sum())
            slots = slice(int(slot_P[here[0]]), int(slot_P[here[-1]]) + 1) if len(here) else slice(0, 0)
            chunks.append(
                _chunk(dispatch.deliveries.rows(here, every_source), slots, slice(first, end), sent_to, device)
            )
            first = end
        return cls(order_R, chunks, dispatch.counts_ES[:, rank].tolist())


def _chunk(rows_HS: IntArray, slots: slice, sent: slice, sent_to: IntArray, device: torch.device) -> Chunk:
    """From the rows of each slot and source."""
    rows_SH = rows_HS.T
    starts_SH = (np.cumsum(rows_SH) - rows_SH.ravel()).reshape(rows_SH.shape)
    is_in_order = (rows_SH > 0).sum() <= 1 or min(rows_HS.shape) <= 1
    by_slot = None if is_in_order else _on(device, _ranges(starts_SH.T.ravel(), rows_HS.ravel()))
    return Chunk(
        slots=slots,
        counts=rows_HS.sum(axis=1).tolist(),
        sent=sent,
        sent_to=sent_to.tolist(),
        received_from=rows_HS.sum(axis=0).tolist(),
        by_slot=by_slot,
    )


def _on(device: torch.device, array: IntArray) -> Tensor:
    """Copy to a device; neither waits for the other."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _ranges(start_N: IntArray, length_N: IntArray) -> IntArray:
    """start, start + 1, ... of each range, one range after the other."""
    before_N = np.cumsum(length_N) - length_N
    offsets: IntArray = np.repeat(start_N - before_N, length_N) + np.arange(length_N.sum())
    return offsets

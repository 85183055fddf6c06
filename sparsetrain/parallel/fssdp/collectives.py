"""spAG and spRS: the two sparse collectives of FSSDP (arXiv 2502.02581, section 4).

P says who owns each expert of a layer, P′ ⊇ P who holds it. spAG(P, P′) copies the owner's weights to every new holder;
spRS(P′, P) brings the holders' gradients back to the owner. Both are one uneven all-to-all, which moves
expert_bytes · |P′_d \\ P_d| to (spAG) or from (spRS) rank d and nothing else, on gloo and on NCCL.

Shapes: N rows sent, R rows received, C numbers of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsetrain.moe.placement import Placement


@dataclass(frozen=True)
class Route:
    """Which experts of a layer one rank sends and receives when replicas are made."""

    sent: tuple[int, ...]
    """By receiving rank, then expert; an expert is there once for each receiver."""
    sent_to: tuple[int, ...]
    """How many of them go to each rank."""
    received: tuple[int, ...]
    """By owner, then expert."""
    received_from: tuple[int, ...]
    """How many of them come from each rank."""
    is_needed: bool
    """Whether anything at all moves, between whichever ranks: if not, nobody calls the collective."""

    @classmethod
    def of(cls, placement: Placement, rank: int, besides: Placement | None = None) -> Self:
        """The view of one rank of the placement's devices.

        Args:
            placement: Who is to hold what.
            rank: Whose view.
            besides: With the same owners: what is held already, and does not move.
        """
        is_new_ED = placement.holders_ED.copy()
        is_new_ED[np.arange(placement.num_experts), placement.owner_E] = False
        if besides is not None:
            is_new_ED &= ~besides.holders_ED
        receiver_N, sent_N = np.nonzero(is_new_ED.T & (placement.owner_E == rank))
        received = np.flatnonzero(is_new_ED[:, rank])
        owner_R = placement.owner_E[received]
        order = np.argsort(owner_R, kind="stable")
        size = placement.num_devices
        return cls(
            sent=tuple(sent_N.tolist()),
            sent_to=tuple(np.bincount(receiver_N, minlength=size).tolist()),
            received=tuple(received[order].tolist()),
            received_from=tuple(np.bincount(owner_R, minlength=size).tolist()),
            is_needed=bool(is_new_ED.any()),
        )


class Transfer:
    """Rows on their way between the ranks of a group; collective, and asynchronous until `wait`.

    Args:
        rows: [N, ...] contiguous, sorted by receiver. Nobody may write to it before `wait` has returned.
        sent_to: Rows for each rank.
        received_from: Rows from each rank.
        group: The ranks.
        what: Said with the error if a rank does not come.
        into: [R, ...] contiguous, where the received rows go; default: into memory of their own.
    """

    def __init__(
        self,
        rows: Tensor,
        sent_to: Sequence[int],
        received_from: Sequence[int],
        group: ProcessGroup,
        *,
        what: str,
        into: Tensor | None = None,
    ) -> None:
        self._rows: Tensor | None = rows  # kept: the network reads it
        self._what = what
        self._received = rows.new_empty(sum(received_from), *rows.shape[1:]) if into is None else into
        self._work = dist.all_to_all_single(
            self._received, rows, list(received_from), list(sent_to), group=group, async_op=True
        )

    @property
    def bytes_received(self) -> int:
        """What comes over the wire to this rank."""
        return self._received.nbytes

    def wait(self) -> Tensor:
        """The received rows [R, ...], sorted by sender; on a GPU the current stream waits, not the program.

        Raises:
            RuntimeError: A rank has died, or has not come within the group's timeout.
        """
        if self._rows is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                error.add_note(f"while {self._what}: another rank has stopped or is late; its own log says why")
                raise
            self._rows = None
        return self._received


def sparse_all_gather(
    rows_NC: Tensor, route: Route, group: ProcessGroup, *, what: str, into: Tensor | None = None
) -> Transfer:
    """spAG: bring owners' experts to their new holders.

    Args:
        rows_NC: The experts of `route.sent`, an expert a row.
        route: What moves.
        group: Its ranks.
        what: As in `Transfer`.
        into: As in `Transfer`.

    Returns:
        Rows [R, C] of the experts of `route.received`, in that order.
    """
    return Transfer(rows_NC, route.sent_to, route.received_from, group, what=what, into=into)


def sparse_reduce_scatter(rows_RC: Tensor, route: Route, group: ProcessGroup, *, what: str) -> Transfer:
    """spRS: bring the gradients of replicas back to their owners, who add them up.

    Args:
        rows_RC: Of the experts of `route.received`, in that order.
        route: What was moved by spAG.
        group: Its ranks.
        what: As in `Transfer`.

    Returns:
        Rows [N, C] for the experts of `route.sent`: those of each expert ascend with the rank that they come from, so
        that a sum in their order is the same in every run.
    """
    return Transfer(rows_RC, route.received_from, route.sent_to, group, what=what)

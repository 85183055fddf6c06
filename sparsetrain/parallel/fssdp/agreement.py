"""Ranks plan for themselves; these make sure that they come to the same, before a collective waits for ever."""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import Placement
from sparsetrain.moe.placement.topology import IntArray


def check_placements(placements: Sequence[Placement], paths: Sequence[str], group: ProcessGroup) -> None:
    """Make sure that all ranks are going to place experts alike; collective.

    Args:
        placements: One a layer.
        paths: The layers' names.
        group: The ranks.

    Raises:
        PlacementError: On every rank, if one rank's plan differs; it names ranks, layer and both plans.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    none = torch.zeros(0, dtype=torch.int64, device=device)
    prints_SL = gather_counts(none, [placement.fingerprint for placement in placements], group)[1]
    differing = np.argwhere(prints_SL != prints_SL[0])
    if len(differing):
        rank, layer = differing[0]
        raise_mismatch(int(rank), described(placements[layer]), group, f"place experts of {paths[layer]}")


def gather_counts(counts_E: Tensor, agreed: Sequence[int], group: ProcessGroup) -> tuple[IntArray, IntArray]:
    """Every rank's numbers of rows, and the numbers that ranks are to agree on; collective, waits for the device.

    Args:
        counts_E: int64, this rank's rows for each expert.
        agreed: A numbers of this rank, for example fingerprints of plans.
        group: The S ranks.

    Returns:
        counts_SE: int64.
        agreed_SA: int64.
    """
    own = torch.cat([counts_E, torch.tensor(agreed, dtype=torch.int64, device=counts_E.device)])
    every = own.new_empty(dist.get_world_size(group), len(own))
    dist.all_gather(list(every.unbind()), own, group=group)
    table: IntArray = every.cpu().numpy()
    return table[:, : len(counts_E)], table[:, len(counts_E) :]


def raise_mismatch(other: int, plan: object, group: ProcessGroup, what: str) -> NoReturn:
    """Stop, naming what the first rank of the group and another one planned; collective."""
    plans: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(plans, plan, group=group)
    ranks = dist.get_process_group_ranks(group)
    raise PlacementError(
        f"ranks {ranks[0]} and {ranks[other]} {what} differently: {plans[0]} and {plans[other]}. Plans are functions "
        "of numbers that all ranks share: make sure that all run the same versions with the same settings"
    )


def described(placement: Placement) -> list[list[int]]:
    """The ranks that hold each expert."""
    return [np.flatnonzero(holders_D).tolist() for holders_D in placement.holders_ED]

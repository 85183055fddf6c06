"""Ranks plan for themselves; these make sure that they come to the same, before a collective waits for ever."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from sparsetrain.errors import PlacementError
from sparsetrain.moe.placement import Placement


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
    own = torch.tensor([placement.fingerprint for placement in placements], dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    prints_SL = torch.stack(every).cpu().numpy()
    differing = np.argwhere(prints_SL != prints_SL[0])
    if len(differing):
        rank, layer = differing[0]
        raise_mismatch(int(rank), lambda: described(placements[layer]), group, f"place experts of {paths[layer]}")


def raise_mismatch(other: int, describe: Callable[[], object], group: ProcessGroup, what: str) -> NoReturn:
    """Stop, naming what the first rank of the group and another one planned; collective."""
    plans: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(plans, describe(), group=group)
    ranks = dist.get_process_group_ranks(group)
    raise PlacementError(
        f"ranks {ranks[0]} and {ranks[other]} {what} differently: {plans[0]} and {plans[other]}. Plans are functions "
        "of numbers that all ranks share: make sure that all run the same versions with the same settings"
    )


def described(placement: Placement) -> list[list[int]]:
    """The ranks that hold each expert."""
    return [np.flatnonzero(holders_D).tolist() for holders_D in placement.holders_ED]

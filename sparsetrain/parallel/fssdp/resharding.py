"""Experts change owners: their rows of parameters and optimizer state, and whatever else is kept for each weight.

Shapes: L layers, E experts of a layer.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate, zip_longest
from math import prod
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparsetrain.errors import PlacementError
from sparsetrain.moe import ExpertSpec
from sparsetrain.moe.placement.topology import IntArray
from sparsetrain.parallel.fssdp.collectives import Transfer
from sparsetrain.parallel.fssdp.groups import ExpertGroups

T = TypeVar("T")
Place = tuple[int, int]
"""(layer, expert)"""


class Resharding:
    """One change of owners, as one rank sees it.

    Args:
        spec: The shape of an expert.
        layer_paths: Where each layer's experts are in the model.
        groups: The ranks.
        old_LE: int64 [L, E], the owners so far.
        new_LE: The owners to be, checked and the same on all ranks.

    Raises:
        PlacementError: A rank would own more or fewer experts than now.
    """

    def __init__(
        self, spec: ExpertSpec, layer_paths: Sequence[str], groups: ExpertGroups, old_LE: IntArray, new_LE: IntArray
    ) -> None:
        self._spec, self._layer_paths, self._groups = spec, layer_paths, groups
        rank, size = groups.rank, groups.size
        before, after = (np.bincount(owners_LE.ravel(), minlength=size) for owners_LE in (old_LE, new_LE))
        if wrong := np.flatnonzero(before != after).tolist():
            raise PlacementError(
                f"rank {wrong[0]} of the expert group owns {before[wrong[0]]} experts and would own "
                f"{after[wrong[0]]}: a resharding must leave every rank as many as it has"
            )
        moving = np.argwhere(old_LE != new_LE)  # by layer, then expert
        source, target = old_LE[tuple(moving.T)], new_LE[tuple(moving.T)]
        self.moved: dict[int, list[int]] = defaultdict(list)
        """All experts that move, by layer, both ascending."""
        for layer, expert in moving.tolist():
            self.moved[layer].append(expert)
        self.leaving = _places(moving, source == rank, order=target)
        """What goes from here, by new owner, layer, expert."""
        self.arriving = _places(moving, target == rank, order=source)
        """What comes here, by old owner, layer, expert."""
        self._sent_to: list[int] = np.bincount(target[source == rank], minlength=size).tolist()
        self._received_from: list[int] = np.bincount(source[target == rank], minlength=size).tolist()
        self.bytes_received = 0
        """What has come over the wire so far."""

    def move_rows(self, tensors: Iterable[Tensor], rows: Sequence[int]) -> None:
        """Move rows of stacked tensors to their new owners, in place; collective, one all-to-all a tensor.

        Args:
            tensors: [S, ...], in the same order on all ranks.
            rows: Those of `leaving`; `arriving` takes their places in turn.
        """
        if not self.moved:
            return
        for tensor in tensors:
            index = torch.tensor(rows, dtype=torch.int64, device=tensor.device)
            tensor[index] = self._transfer(tensor[index], self._sent_to, self._received_from)

    def carry(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `Move.carry` promises: all values as bytes, in one all-to-all."""
        shapes = self._shapes()
        if unknown := values.keys() - shapes.keys():
            raise KeyError(f"{min(unknown)} has not moved")
        if not values:
            return {}
        size = {name: prod(shapes[name]) * value.element_size() for name, value in values.items()}
        leaving = [[name for name in self._names(place) if name in values] for place in self.leaving]
        arriving = [[name for name in self._names(place) if name in values] for place in self.arriving]
        nothing = torch.empty(0, dtype=torch.uint8, device=next(iter(values.values())).device)
        sent = torch.cat([nothing, *(_as_bytes(values[name]) for names in leaving for name in names)])
        received = self._transfer(
            sent, _bytes_by_rank(leaving, self._sent_to, size), _bytes_by_rank(arriving, self._received_from, size)
        )
        here = [name for names in arriving for name in names]
        carried = {name: value.new_empty(0, *shapes[name][1:]) for name, value in values.items()}
        for name, piece in zip(here, torch.split(received, [size[name] for name in here]), strict=True):
            # Cloned: a piece of the buffer may begin where a number of its type cannot.
            carried[name] = piece.clone().view(values[name].dtype).view(shapes[name])
        return carried

    def _names(self, place: Place) -> list[str]:
        """The weights of an expert."""
        layer, expert = place
        return [f"{self._layer_paths[layer]}.{expert}.{weight}" for weight in self._spec.weights]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the moved weights, by name."""
        shapes = self._spec.weight_shapes().values()
        places = [(layer, expert) for layer, experts in self.moved.items() for expert in experts]
        return {name: shape for place in places for name, shape in zip(self._names(place), shapes, strict=True)}

    def _transfer(self, rows: Tensor, sent_to: Sequence[int], received_from: Sequence[int]) -> Tensor:
        transfer = Transfer(rows, sent_to, received_from, self._groups.parameters, what="moving experts to new owners")
        self.bytes_received += transfer.bytes_received
        return transfer.wait()


def _places(moving: IntArray, chosen: np.ndarray, order: IntArray) -> list[Place]:
    ordered = np.argsort(order[chosen], kind="stable")
    return [(layer, expert) for layer, expert in moving[chosen][ordered].tolist()]


def _as_bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def _bytes_by_rank(names: Sequence[Sequence[str]], counts: Sequence[int], size: Mapping[str, int]) -> list[int]:
    """How many bytes go to (or come from) each rank, `counts` of the experts with these names each."""
    sizes = [sum(size[name] for name in of_expert) for of_expert in names]
    ends = list(accumulate(counts))
    return [sum(sizes[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def check_agreement(
    groups: ExpertGroups, layer_paths: Sequence[str], owners_LE: IntArray, tensors: Sequence[str]
) -> None:
    """Make sure that all ranks are about to do the same; collective over all data-parallel ranks.

    Args:
        groups: The ranks.
        layer_paths: Names of the layers.
        owners_LE: The owners to be.
        tensors: Names of what is going to be moved.

    Raises:
        PlacementError: On every rank, where one differs.
    """
    digest = blake2b(np.ascontiguousarray(owners_LE).tobytes() + repr(tensors).encode(), digest_size=8).digest()
    if len(set(_of_all_ranks(groups, digest))) > 1:
        plans = _of_all_ranks(groups, (dist.get_rank(), owners_LE.tolist(), list(tensors)))
        raise PlacementError(_difference(plans, layer_paths))


def _of_all_ranks(groups: ExpertGroups, own: T) -> list[T]:
    """What every data-parallel rank has, the same list on all of them; collective."""
    of_group: list[T] = [own] * groups.size
    dist.all_gather_object(of_group, own, group=groups.parameters)
    if groups.replicate is None:
        return of_group
    of_groups: list[list[T]] = [of_group] * groups.num_groups
    dist.all_gather_object(of_groups, of_group, group=groups.replicate)
    return [each for of_group in of_groups for each in of_group]


def _difference(plans: Sequence[tuple[int, list[list[int]], list[str]]], layer_paths: Sequence[str]) -> str:
    """How the first rank whose plan differs from that of the first rank of all does so."""
    first, first_LE, first_tensors = plans[0]
    rank, owners_LE, tensors = next(plan for plan in plans if plan[1:] != (first_LE, first_tensors))
    if tensors != first_tensors:
        return (
            f"ranks {first} and {rank} keep different tensors for the experts to be moved: {first_tensors} and "
            f"{tensors}. Every rank must run the same backward passes and optimizer steps"
        )
    layer, first_E, owner_E = next(
        (layer, *pair) for layer, pair in enumerate(zip_longest(first_LE, owners_LE)) if pair[0] != pair[1]
    )
    where = layer_paths[layer] if layer < len(layer_paths) else f"layer {layer}"
    return f"ranks {first} and {rank} were given different owners for {where}: {first_E} and {owner_E}"

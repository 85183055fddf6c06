"""Shards of a flat partition: parameters laid end to end in one buffer that is cut evenly over ranks, as ZeRO does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsetrain.errors import ShardingError
from sparsetrain.sharding.shard import WeightShard


@dataclass(frozen=True)
class FlatPartition:
    """One rank's piece of the buffer; each accessor returns a 1-D tensor of `local_numel` elements (or None)."""

    shapes: Mapping[str, tuple[int, ...]]
    """Parameters in buffer order."""
    group: ProcessGroup | None
    weight: Callable[[], Tensor]
    grad: Callable[[], Tensor | None]
    master: Callable[[], Tensor] | None = None
    """The optimizer's own copy; default `weight`."""
    moments: Callable[[], dict[str, Tensor]] = field(default=dict)
    replica_rank: int = 0
    align: int = 1
    """Every rank's piece is a multiple of so many elements."""

    @property
    def local_numel(self) -> int:
        """Elements a rank holds: the buffer is padded until all ranks hold equally many."""
        ways = self.align * (dist.get_world_size(self.group) if self.group is not None else 1)
        return self.align * -(-sum(map(prod, self.shapes.values())) // ways)

    def shards(self) -> Sequence[WeightShard]:
        """A shard for every parameter on every rank, empty where the rank's range does not meet the parameter.

        Raises:
            ShardingError: The weight buffer has not `local_numel` elements.
        """
        shape = tuple(self.weight().shape)
        if shape != (self.local_numel,):
            raise ShardingError(f"flat partition: the local buffer has shape {shape}, expected ({self.local_numel},)")
        first = self.local_numel * (dist.get_rank(self.group) if self.group is not None else 0)
        shards, start = [], 0
        for name, shape in self.shapes.items():
            stop = start + prod(shape)
            begin = min(max(first, start), stop)
            end = max(min(first + self.local_numel, stop), begin)
            shards.append(self._shard(name, shape, slice(begin - start, end - start), begin - first))
            start = stop
        return shards

    def _shard(self, name: str, shape: tuple[int, ...], part: slice, at: int) -> WeightShard:
        here = slice(max(at, 0), max(at, 0) + part.stop - part.start)

        def piece_of_grad() -> Tensor | None:
            grad = self.grad()
            return None if grad is None else grad[here]

        master = self.master or self.weight
        return WeightShard(
            name=name,
            global_shape=shape,
            slices=(part,),
            group=self.group,
            replica_rank=self.replica_rank,
            weight=lambda: self.weight()[here],
            grad=piece_of_grad,
            master=lambda: master()[here],
            moments=lambda: {key: value[here] for key, value in self.moments().items()},
        )

"""Stacked parameters: each row along the first dimension, or a part of it, is a weight of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from sparsetrain.sharding.dtensor import dtensor_groups, dtensor_slices, local_grad, local_part
from sparsetrain.sharding.self_described import MomentsOf
from sparsetrain.sharding.shard import WeightShard


@dataclass(frozen=True)
class Stack:
    """The rows of a stacked parameter that this rank holds; accessors return [local rows, *row_shape] (or None)."""

    row_shape: tuple[int, ...]
    group: ProcessGroup | None
    """The ranks whose stacks together hold every row once; None: this rank holds all."""
    replica_rank: int
    weight: Callable[[], Tensor]
    """Also what the optimizer updates."""
    grad: Callable[[], Tensor | None]
    moments: Callable[[], dict[str, Tensor]]
    first_row: int = 0
    """Index of the first local row in the whole stack, where rows lie in order."""

    @classmethod
    def of(cls, parameter: Tensor, moments: MomentsOf, replica_rank: int = 0) -> "Stack":
        """The local rows of a parameter that is plain, or sharded along its first dimension by `fully_shard`.

        Raises:
            ShardingError: It is sharded in another way.
        """
        if isinstance(parameter, DTensor):
            group, replica_rank = dtensor_groups("a stacked parameter", parameter, only_dim=0)
            first_row = dtensor_slices(parameter)[0].start
        else:
            group, first_row = None, 0
        return cls(
            row_shape=tuple(parameter.shape[1:]),
            group=group,
            replica_rank=replica_rank,
            weight=partial(local_part, parameter),
            grad=partial(local_grad, parameter),
            moments=partial(moments, parameter),
            first_row=first_row,
        )

    def shards_in_order(self, names: Sequence[str], part: slice = slice(None)) -> list[WeightShard]:
        """Describe the weights of all rows of the whole stack, by their names in order."""
        num_rows = len(self.weight())
        rows = [row if 0 <= (row := at - self.first_row) < num_rows else None for at in range(len(names))]
        return self.shards(names, rows, part)

    def shards(self, names: Sequence[str], rows: Sequence[int | None], part: slice = slice(None)) -> list[WeightShard]:
        """Describe weights that are each whole on the rank that holds their row, and empty elsewhere.

        Args:
            names: Canonical names.
            rows: The local row of each; None where this rank does not hold it.
            part: The weight's range of its row's first dimension, where a row holds several side by side.
        """
        return [self._shard(name, row, part) for name, row in zip(names, rows, strict=True)]

    def _shard(self, name: str, row: int | None, part: slice) -> WeightShard:
        start, stop, _ = part.indices(self.row_shape[0])
        shape = (stop - start, *self.row_shape[1:])
        held = shape if row is not None else (0, *shape[1:])

        def cut(stack: Tensor) -> Tensor:
            return stack.new_empty(held) if row is None else stack[row, start:stop]

        def weight() -> Tensor:
            return cut(self.weight())

        def grad() -> Tensor | None:
            stack = self.grad()
            return None if stack is None else cut(stack)

        return WeightShard(
            name=name,
            global_shape=shape,
            slices=tuple(slice(0, size) for size in held),
            group=self.group,
            replica_rank=self.replica_rank,
            weight=weight,
            grad=grad,
            master=weight,
            moments=lambda: {key: cut(value) for key, value in self.moments().items()},
        )

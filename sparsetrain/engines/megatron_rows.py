"""Optimizer state shared among the ranks that hold copies of a weight: each looks after some of its rows (ZeRO-1).

Gradients are added up on all copies; a rank updates the rows that it looks after, in place in the parameter, and the
others send it theirs. A row is a piece of one weight of the plain model, so masks, norms and checkpoints work on rows
as on whole weights. (Megatron's own distributed optimizer cuts one flat buffer evenly: a rank's part of a matrix that
tensor parallelism cuts by its inputs would be no box of the weight, and masks know of boxes.)
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sparsetrain.engines.optimizer import OptimizerGroup

_BUCKET = 2**26
"""Elements that are gathered at a time, unless one parameter has more: they are copied on the way."""


class RowPartition:
    """The rows that this rank looks after, of parameters that others have copies of.

    Args:
        parameters: Of one dtype, in the same order on all ranks.
        copies: The ranks that hold a copy of each.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], copies: ProcessGroup) -> None:
        self._copies = copies
        self._parameters = list(parameters)
        self._pieces = {
            id(parameter): nn.Parameter(parameter.detach()[self.rows(parameter)]) for parameter in self._parameters
        }

    def rows(self, parameter: nn.Parameter) -> slice:
        """Which rows of a parameter this rank looks after."""
        return self._rows_of(len(parameter), self._copies.rank())

    def piece(self, parameter: nn.Parameter) -> nn.Parameter:
        """These rows, sharing the parameter's memory; itself if it is not partitioned."""
        return self._pieces.get(id(parameter), parameter)

    def groups(self, groups: Iterable[OptimizerGroup]) -> list[OptimizerGroup]:
        """What an optimizer updates here, in place of whole parameters."""
        return [OptimizerGroup(list(map(self._piece_of, group.parameters)), group.is_decayed) for group in groups]

    def take_gradients(self) -> None:
        """Give the optimizer the gradients of this rank's rows, out of those of the parameters."""
        for parameter in self._parameters:
            grad, parameter.grad = parameter.grad, None
            self.piece(parameter).grad = None if grad is None else grad[self.rows(parameter)]

    @torch.no_grad()
    def gather(self) -> None:
        """Bring here the rows that others look after; collective over the copies."""
        for bucket in _buckets(self._parameters):
            self._gather(bucket)

    def _piece_of(self, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, nn.Parameter)
        return self.piece(parameter)

    def _gather(self, parameters: list[nn.Parameter]) -> None:
        """One message: every rank's rows end to end, as long as the longest."""
        longest = max(sum(self._numel(parameter, rank) for parameter in parameters) for rank in self._ranks)
        first = parameters[0]
        mine = torch.zeros(longest, dtype=first.dtype, device=first.device)
        own = torch.cat([self.piece(parameter).flatten() for parameter in parameters])
        mine[: len(own)] = own
        every = mine.new_empty(self._copies.size(), longest)
        dist.all_gather_into_tensor(every.view(-1), mine, group=self._copies)
        for rank in self._ranks:
            if rank == self._copies.rank():
                continue
            at = 0
            for parameter in parameters:
                rows = parameter.detach()[self._rows_of(len(parameter), rank)]
                rows.copy_(every[rank, at : at + rows.numel()].view_as(rows))
                at += rows.numel()

    @property
    def _ranks(self) -> range:
        return range(self._copies.size())

    def _rows_of(self, count: int, rank: int) -> slice:
        """A rank's rows of so many; the first ranks have one more where they do not come out even."""
        share, rest = divmod(count, self._copies.size())
        start = share * rank + min(rank, rest)
        return slice(start, start + share + (rank < rest))

    def _numel(self, parameter: nn.Parameter, rank: int) -> int:
        rows = self._rows_of(len(parameter), rank)
        return len(range(len(parameter))[rows]) * (parameter.numel() // len(parameter))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and parameter.numel() + sum(other.numel() for other in bucket) > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket

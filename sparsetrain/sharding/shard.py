"""WeightShard: the one contract about where a weight lives.

Whoever lays a weight over ranks describes it once, as shards. Masks, the true gradient norm, checkpoints, resharding
and the conversion between engines consume shards and nothing else, so none of them knows about DDP, DTensor or flat
partitions.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Rectangle:
    """An n-dimensional box of the global weight that lies contiguously in a rank's local part."""

    offsets: tuple[int, ...]
    """First index of the box along each dimension of the global weight."""
    sizes: tuple[int, ...]
    start: int
    """Position of the box in the flattened local part."""

    @property
    def stop(self) -> int:
        """One past the box's last position in the flattened local part."""
        return self.start + math.prod(self.sizes)

    def view(self, local: Tensor) -> Tensor:
        """The box's data in `local` (contiguous, of `local_shape`), shaped like the box and sharing its memory."""
        return local.view(-1)[self.start : self.stop].view(self.sizes)


@dataclass(frozen=True, eq=False)
class WeightShard:
    """The part of the global weight `name` that this rank holds.

    The accessors return the live tensors, without autograd, each of `local_shape`; writing to them changes the model.
    A rank may hold nothing of a weight: then `local_numel` is 0 and everything else still works.
    """

    name: str
    global_shape: tuple[int, ...]
    slices: tuple[slice, ...]
    """One slice for each dimension of `global_shape`; or a single slice over the row-major flattened weight."""
    group: ProcessGroup | None
    """The ranks whose parts add up to one copy of the weight; None: this rank holds all of it."""
    replica_rank: int
    """Which copy this is, of several; copy 0 speaks for all where one must."""
    weight: Callable[[], Tensor] = field(repr=False)
    grad: Callable[[], Tensor | None] = field(repr=False)
    master: Callable[[], Tensor] = field(repr=False)
    moments: Callable[[], dict[str, Tensor]] = field(repr=False)

    def __post_init__(self) -> None:
        assert self.is_flat or len(self.slices) == len(self.global_shape), (self.name, self.slices, self.global_shape)

    def local_weight(self) -> Tensor:
        """What the forward pass multiplies with."""
        return self.weight()

    def local_grad(self) -> Tensor | None:
        """The gradient, already summed over data-parallel ranks; None where there is none."""
        return self.grad()

    def local_master(self) -> Tensor:
        """What the optimizer updates: the weight itself unless the engine keeps another copy."""
        return self.master()

    def local_moments(self) -> dict[str, Tensor]:
        """The optimizer's per-weight state by name, for example exp_avg and exp_avg_sq; empty before its first step."""
        return self.moments()

    @property
    def is_flat(self) -> bool:
        """Whether `slices` is a range of the flattened weight."""
        return len(self.slices) == 1 and len(self.global_shape) != 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local part."""
        return tuple(part.stop - part.start for part in self.slices)

    @property
    def local_numel(self) -> int:
        """Number of weights held here."""
        return math.prod(self.local_shape)

    @property
    def global_numel(self) -> int:
        """Number of weights of the whole."""
        return math.prod(self.global_shape)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor shaped like the global weight, as a view."""
        return (whole.reshape(-1) if self.is_flat else whole)[self.slices]

    def global_indices(self, device: torch.device | None = None) -> Tensor:
        """Row-major position in the global weight of each local element: int64 of `local_shape`."""
        index = torch.zeros((), dtype=torch.int64, device=device)
        dims = (self.global_numel,) if self.is_flat else self.global_shape
        for part, size in zip(self.slices, dims, strict=True):
            along = torch.arange(part.start, part.stop, dtype=torch.int64, device=device)
            index = index.unsqueeze(-1) * size + along
        return index

    def rectangles(self) -> list[Rectangle]:
        """The local part as boxes of the global weight, in local order: one, or up to 2·dims − 1 for a flat range."""
        if self.local_numel == 0:
            return []
        if not self.is_flat:
            return [Rectangle(tuple(part.start for part in self.slices), self.local_shape, 0)]
        start, stop = self.slices[0].start, self.slices[0].stop
        return list(_boxes_of_range(self.global_shape, start, stop))


def _boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Rectangle]:
    """Cut the flat range [start, stop) of a row-major tensor into boxes, each the largest that fits after the last."""
    if not shape:
        yield Rectangle((), (), 0)
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    at = start
    while at < stop:
        dim = next(d for d, stride in enumerate(strides) if at % stride == 0 and at + stride <= stop)
        offsets = [at // stride % size for stride, size in zip(strides, shape, strict=True)]
        count = min((stop - at) // strides[dim], shape[dim] - offsets[dim])
        sizes = [1] * dim + [count] + list(shape[dim + 1 :])
        yield Rectangle(tuple(offsets), tuple(sizes), at - start)
        at += count * strides[dim]

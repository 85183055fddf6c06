"""Modules that say themselves which weights their parameters hold, because the two are not one to one.

The experts of a layer, for example, are stacked: one parameter holds as many weights as there are experts, each with a
name, a mask and a place of its own.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from sparsetrain.sharding.shard import WeightShard

MomentsOf = Callable[[Tensor], dict[str, Tensor]]
"""The optimizer's state tensors of a parameter that are shaped like it, without DTensor's wrapping."""


@runtime_checkable
class DescribesWeights(Protocol):
    """An nn.Module whose parameters, and those of its children, are seen through these two methods only."""

    def describe_weights(self, path: str) -> dict[str, tuple[int, ...]]:
        """Whole shape of every weight that the module stands for, by canonical name, the same on every rank.

        Args:
            path: Where the module is, for example "layers.0.moe.experts".
        """
        ...

    def shards_of_weights(self, path: str, moments: MomentsOf, replica_rank: int) -> list[WeightShard]:
        """What this rank holds of each of them, in the same order.

        Args:
            path: As above.
            moments: Where the optimizer's state is.
            replica_rank: Which copy of several this is, as far as a wrapper around the module knows.
        """
        ...


@runtime_checkable
class PartOfModel(Protocol):
    """An nn.Module that is one rank's part of a model: some of its layers, and of some weights a piece."""

    @property
    def whole(self) -> nn.Module:
        """The whole model, on the meta device: what it is made of, and the name and shape of every weight."""
        ...

    def multiplied_part(self, name: str, whole: Tensor) -> Tensor:
        """Of a tensor shaped like the whole weight `name`, as a view, the part that a layer here multiplies with."""
        ...


def whole_model(module: nn.Module) -> nn.Module:
    """The model that a module is a part of; itself if it is a whole one."""
    return module.whole if isinstance(module, PartOfModel) else module

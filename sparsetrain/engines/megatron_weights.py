"""Which part of which weight of the plain model each of Megatron's parameters on this rank is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sparsetrain.engines.megatron_rows import RowPartition
from sparsetrain.planning.tensor_parallel import cut_dim
from sparsetrain.sharding import DescribesWeights, MomentsOf, WeightShard, weight_modules


class StageWeights:
    """The weights of a model, those of other pipeline stages included, as this rank holds them.

    Args:
        shapes: Whole shape of every weight of the whole model by name, in order.
        groups: Megatron's process groups.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], groups: ProcessGroupCollection) -> None:
        self._shapes = dict(shapes)
        self._groups = groups
        self._spread: SpreadExperts | None = None
        self._rows: RowPartition | None = None
        self._alike: ProcessGroup | None = None

    def spread(self, experts: "SpreadExperts") -> None:
        """Note that experts are no longer whole on each rank."""
        self._spread = experts

    def share_rows(self, stage: nn.Module, timeout: timedelta) -> RowPartition:
        """Have each rank look after some rows only of what others hold, too; collective over all ranks.

        Experts are left alone: they are spread over ranks, or stacked.
        """
        own = [parameter for _, _, parameters in _modules(stage) for parameter in parameters.values()]
        size = self._groups.tp.size()
        # Ranks that hold a copy of the model between them, when each tensor-parallel rank has all of a weight.
        alike = [list(range(first, dist.get_world_size(), size)) for first in range(size)]
        self._alike, _ = dist.new_subgroups_by_enumeration(alike, timeout=timeout)  # type: ignore[no-untyped-call]
        self._rows = RowPartition(own, self._groups.dp_cp)
        return self._rows

    def describe(self, path: str) -> dict[str, tuple[int, ...]]:
        """Whole shapes by name."""
        return {_join(path, name): shape for name, shape in self._shapes.items()}

    def shards(self, stage: nn.Module, path: str, moments: MomentsOf) -> list[WeightShard]:
        """What this rank holds of each weight, in the order of `describe`.

        Args:
            stage: With the submodules of this stage under the names of the plain model.
            path: Where the stage is in what it is part of.
            moments: Where the optimizer's state is.
        """
        held = {shard.name: shard for shard in self._held(stage, moments)}
        device = next(stage.parameters()).device
        shards = [held[name] if name in held else self._elsewhere(name, device) for name in self._shapes]
        return [replace(shard, name=_join(path, shard.name)) for shard in shards]

    def _held(self, stage: nn.Module, moments: MomentsOf) -> Iterator[WeightShard]:
        for path, owner, parameters in _modules(stage):
            if isinstance(owner, DescribesWeights):
                for shard in owner.shards_of_weights(path, moments, self._copy(path)):
                    yield replace(shard, group=self._group(path))
            else:
                for name, parameter in parameters.items():
                    yield self._shard(name, parameter, moments)

    def _shard(self, name: str, parameter: nn.Parameter, moments: MomentsOf) -> WeightShard:
        dim, shape = cut_dim(name), self._shapes[name]
        slices = [slice(0, size) for size in shape]
        if dim is not None:
            size, rank = parameter.shape[dim], self._groups.tp.rank()
            slices[dim] = slice(size * rank, size * (rank + 1))
        if self._rows is not None:
            rows, first = self._rows.rows(parameter), slices[0].start
            slices[0] = slice(first + rows.start, first + rows.stop)
            parameter = self._rows.piece(parameter)
        weight = partial(Tensor.detach, parameter)
        return WeightShard(
            name=name,
            global_shape=shape,
            slices=tuple(slices),
            group=self._group(name),
            replica_rank=self._copy(name),
            weight=weight,
            grad=lambda: parameter.grad,
            master=weight,
            moments=partial(moments, parameter),
        )

    def _elsewhere(self, name: str, device: torch.device) -> WeightShard:
        """Of a weight that another stage has."""
        shape = self._shapes[name]
        held = (0, *shape[1:])
        nothing = partial(torch.empty, held, device=device)
        return WeightShard(
            name=name,
            global_shape=shape,
            slices=tuple(slice(0, size) for size in held),
            group=self._group(name),
            replica_rank=self._copy(name),
            weight=nothing,
            grad=lambda: None,
            master=nothing,
            moments=dict,
        )

    def _group(self, name: str) -> ProcessGroup | None:
        """The ranks that hold one copy of a weight between them: ranks of every stage, for a weight is on one."""
        group: ProcessGroup
        if self._spread is not None and _is_expert(name):
            group = self._spread.across_stages
        elif self._rows is not None and not _is_expert(name):
            assert self._alike is not None
            assert dist.group.WORLD is not None
            group = self._alike if cut_dim(name) is None else dist.group.WORLD
        else:
            group = self._groups.pp if cut_dim(name) is None else self._groups.mp
        return group if group.size() > 1 else None

    def _copy(self, name: str) -> int:
        """Which copy this rank has: tensor-parallel ranks have one each of what is not cut."""
        if self._spread is not None and _is_expert(name):
            return self._spread.replica_rank
        copy: int = 0 if self._rows is not None and not _is_expert(name) else self._groups.dp_cp.rank()
        return copy if cut_dim(name) is not None else copy * self._groups.tp.size() + self._groups.tp.rank()


@dataclass(frozen=True)
class SpreadExperts:
    """Experts that are each on one rank of a group."""

    across_stages: ProcessGroup
    """The ranks that hold all experts of the model once: an expert group, and those in its place on other stages."""
    replica_rank: int
    """Which of the expert groups of a stage this rank is in."""


def _is_expert(name: str) -> bool:
    return ".moe.experts" in name


def _modules(stage: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """As `weight_modules`, of what is in a stage."""
    for child, module in stage.named_children():
        for path, owner, parameters in weight_modules(module):
            yield _join(child, path), owner, {_join(child, name): parameter for name, parameter in parameters.items()}


def _join(first: str, second: str) -> str:
    return f"{first}.{second}" if first and second else first or second

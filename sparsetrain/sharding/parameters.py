"""Shards of the parameters of a module: plain, wrapped in DDP, compiled, or laid out by `fully_shard` (DTensor)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from sparsetrain.errors import ShardingError
from sparsetrain.sharding.names import canonical_parameters
from sparsetrain.sharding.shard import WeightShard


def weight_shards(module: nn.Module, optimizer: Optimizer | None = None) -> list[WeightShard]:
    """Describe every parameter of `module`, in the order of `named_parameters`, a shared parameter once.

    Args:
        module: Plain, DDP-wrapped, compiled, or sharded by `fully_shard` over one dimension of its mesh.
        optimizer: Where the moments are; without it `local_moments` is empty.

    Raises:
        ShardingError: A parameter is laid out in a way that is not a box of the global weight.
    """
    reshard(module)
    moments = _moments_reader(optimizer)
    replica_rank = dist.get_rank(module.process_group) if isinstance(module, nn.parallel.DistributedDataParallel) else 0
    return [
        _dtensor_shard(name, parameter, moments)
        if isinstance(parameter, DTensor)
        else _plain_shard(name, parameter, moments, replica_rank)
        for name, parameter in canonical_parameters(module)
    ]


def reshard(module: nn.Module) -> None:
    """Let go of gathered parameters: after a mere evaluation a `fully_shard`ed module still has some in place."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def _plain_shard(name: str, parameter: Tensor, moments: "_Moments", replica_rank: int) -> WeightShard:
    return WeightShard(
        name=name,
        global_shape=tuple(parameter.shape),
        slices=tuple(slice(0, size) for size in parameter.shape),
        group=None,
        replica_rank=replica_rank,
        weight=parameter.detach,
        grad=lambda: parameter.grad,
        master=parameter.detach,
        moments=partial(moments, parameter),
    )


def _dtensor_shard(name: str, parameter: DTensor, moments: "_Moments") -> WeightShard:
    group, replica_rank = _groups(name, parameter)
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    # A rank beyond the last shard gets an offset past the end: keep the empty slice inside the weight.
    slices = tuple(
        slice(min(offset, whole), min(offset, whole) + size)
        for offset, size, whole in zip(offsets, sizes, parameter.shape, strict=True)
    )

    def local() -> Tensor:
        with torch.no_grad():
            return parameter.to_local()

    def grad() -> Tensor | None:
        return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad

    return WeightShard(
        name=name,
        global_shape=tuple(parameter.shape),
        slices=slices,
        group=group,
        replica_rank=replica_rank,
        weight=local,
        grad=grad,
        master=local,
        moments=partial(moments, parameter),
    )


def _groups(name: str, parameter: DTensor) -> tuple[ProcessGroup | None, int]:
    """The group that shards a parameter, and which of the replicated copies this rank belongs to."""
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ShardingError(f"{name}: this rank is not part of the parameter's mesh {mesh}")
    sharded, replica_rank = [], 0
    for dim, placement in enumerate(parameter.placements):
        # Exact types: the strided and ragged relatives of Shard do not hold one box of the weight.
        if type(placement) is Shard:
            sharded.append(dim)
        elif isinstance(placement, Replicate):
            replica_rank = replica_rank * mesh.size(dim) + coordinate[dim]
        else:
            raise ShardingError(f"{name}: placement {placement} is not supported; use Shard or Replicate")
    if len(sharded) > 1:
        raise ShardingError(f"{name}: sharded over {len(sharded)} mesh dimensions; one is supported")
    return (mesh.get_group(sharded[0]) if sharded else None), replica_rank


_Moments = Callable[[Tensor], dict[str, Tensor]]


def _moments_reader(optimizer: Optimizer | None) -> _Moments:
    def moments(parameter: Tensor) -> dict[str, Tensor]:
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        return {
            key: value.to_local() if isinstance(value, DTensor) else value
            for key, value in state.items()
            if torch.is_tensor(value) and value.shape == parameter.shape and value.dim() > 0
        }

    return moments

"""Shards of the weights of a module: plain, wrapped in DDP, compiled, laid out by `fully_shard`, or self-described."""

import contextlib
import gc
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sparsetrain.sharding.dtensor import dtensor_groups, dtensor_slices, local_grad, local_part
from sparsetrain.sharding.names import weight_modules
from sparsetrain.sharding.self_described import DescribesWeights, MomentsOf
from sparsetrain.sharding.shard import WeightShard


def weight_shards(
    module: nn.Module, optimizer: Optimizer | None = None, *, replica_rank: int | None = None
) -> list[WeightShard]:
    """Describe every weight of `module`, in the order of its modules, a shared parameter once.

    Args:
        module: Plain, DDP-wrapped, compiled, or sharded by `fully_shard` over one dimension of its mesh. What its
            submodules that are DescribesWeights hold is what they say.
        optimizer: Where the moments are; without it `local_moments` is empty.
        replica_rank: Which copy this rank has of what is replicated; default: DDP's rank, or 0 without DDP.

    Raises:
        ShardingError: A parameter is laid out in a way that is not a box of the global weight.
    """
    reshard(module)
    moments = _moments_reader(optimizer)
    if replica_rank is None:
        is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        replica_rank = dist.get_rank(module.process_group) if is_ddp else 0  # type: ignore[arg-type]
    shards: list[WeightShard] = []
    with _no_garbage():
        for path, owner, parameters in weight_modules(module):
            if isinstance(owner, DescribesWeights):
                shards += owner.shards_of_weights(path, moments, replica_rank)
            else:
                shards += [_shard(name, parameter, moments, replica_rank) for name, parameter in parameters.items()]
    return shards


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Do not look for garbage: of 50,000 experts' shards nothing is, and looking takes five times the rest."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shape of every weight of `module` by canonical name, in the order of `weight_shards`; meta is enough."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, owner, parameters in weight_modules(module):
        if isinstance(owner, DescribesWeights):
            shapes |= owner.describe_weights(path)
        else:
            shapes |= {name: whole_shape(parameter) for name, parameter in parameters.items()}
    return shapes


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole of which a parameter is here; ZeRO-3 leaves an empty one, and notes what it stands for."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def reshard(module: nn.Module) -> None:
    """Let go of gathered parameters: after a mere evaluation a `fully_shard`ed module still has some in place."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def _shard(name: str, parameter: Tensor, moments: MomentsOf, replica_rank: int) -> WeightShard:
    if isinstance(parameter, DTensor):
        slices = dtensor_slices(parameter)
        group, replica_rank = dtensor_groups(name, parameter)
    else:
        slices, group = tuple(slice(0, size) for size in parameter.shape), None
    weight = partial(local_part, parameter)
    return WeightShard(
        name=name,
        global_shape=tuple(parameter.shape),
        slices=slices,
        group=group,
        replica_rank=replica_rank,
        weight=weight,
        grad=partial(local_grad, parameter),
        master=weight,
        moments=partial(moments, parameter),
    )


def _moments_reader(optimizer: Optimizer | None) -> MomentsOf:
    def moments(parameter: Tensor) -> dict[str, Tensor]:
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        return {
            key: value.to_local() if isinstance(value, DTensor) else value
            for key, value in state.items()
            if torch.is_tensor(value) and value.shape == parameter.shape and value.dim() > 0
        }

    return moments

"""What a DTensor says about where it lies, in the terms of WeightShard."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sparsetrain.errors import ShardingError


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, sharing its memory, without autograd."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def local_grad(parameter: Tensor) -> Tensor | None:
    """The part of a parameter's gradient that is on this rank; None where there is none."""
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def dtensor_slices(tensor: DTensor) -> tuple[slice, ...]:
    """The box of the whole that this rank holds."""
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    # A rank beyond the last shard gets an offset past the end: keep the empty slice inside the weight.
    return tuple(
        slice(min(offset, whole), min(offset, whole) + size)
        for offset, size, whole in zip(offsets, sizes, tensor.shape, strict=True)
    )


def dtensor_groups(name: str, tensor: DTensor, *, only_dim: int | None = None) -> tuple[ProcessGroup | None, int]:
    """The group that shards a tensor, and which of the replicated copies this rank belongs to.

    Args:
        name: For messages.
        tensor: Sharded over one dimension of its mesh at most.
        only_dim: The one dimension of the tensor that may be cut; None for any.

    Raises:
        ShardingError: The layout is another.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ShardingError(f"{name}: this rank is not part of the parameter's mesh {mesh}")
    sharded, replica_rank = [], 0
    for dim, placement in enumerate(tensor.placements):
        # Exact types: the strided and ragged relatives of Shard do not hold one box of the weight.
        if type(placement) is Shard and only_dim in (None, placement.dim):
            sharded.append(dim)
        elif isinstance(placement, Replicate):
            replica_rank = replica_rank * mesh.size(dim) + coordinate[dim]
        else:
            allowed = "Shard" if only_dim is None else f"Shard({only_dim})"
            raise ShardingError(f"{name}: placement {placement} is not supported; use {allowed} or Replicate")
    if len(sharded) > 1:
        raise ShardingError(f"{name}: sharded over {len(sharded)} mesh dimensions; one is supported")
    return (mesh.get_group(sharded[0]) if sharded else None), replica_rank

"""Data parallelism, applied from outside to a model that knows nothing of it."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.config import ParallelConfig
from sparsetrain.parallel.fssdp.store import store_parameters
from sparsetrain.parallel.parallelize import ignore_stores
from sparsetrain.parallel.world import World


def parallelize_data(
    model: nn.Module, layers: Iterable[nn.Module], parallel: ParallelConfig, world: World
) -> nn.Module:
    """Replicate or shard `model` over all ranks; gradients come out averaged over them.

    Experts that are spread over ranks are left alone.

    Args:
        model: On its device for shard=ddp. For shard=full it may be on the meta device, to be materialised afterwards:
            then no rank ever holds the whole.
        layers: Submodules that shard=full gathers and frees one at a time.
        parallel: Which of the two, and over how many ranks one copy of the weights is spread.
        world: The ranks.

    Returns:
        The module to call: a wrapper for ddp on several ranks, else the model itself.
    """
    if parallel.shard == "full":
        mesh = world.mesh(parallel.shard_size or world.size)
        # A mesh of one dimension says: no replication, reduce-scatter only.
        mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
        ignored = set(store_parameters(model).values())
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        return model
    if world.size > 1:
        ignore_stores(model)
        # Gradients as views of the buckets: no copy before and after the all-reduce.
        return DistributedDataParallel(model, gradient_as_bucket_view=True, process_group=dist.group.WORLD)
    return model

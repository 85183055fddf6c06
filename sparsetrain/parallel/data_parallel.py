"""Data parallelism, applied from outside to a model that knows nothing of it."""

from collections.abc import Iterable

from torch import nn

from sparsetrain.config import ParallelConfig
from sparsetrain.parallel.parallelize import replicate, shard_fully
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
        shard_fully(model, layers, mesh if mesh.size(0) > 1 else mesh["shard"])
        return model
    return replicate(model) if world.size > 1 else model

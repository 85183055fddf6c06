"""Experts spread over the ranks of a run, as its YAML says."""

from datetime import timedelta

from torch import nn

from sparsetrain.config import ParallelConfig
from sparsetrain.parallel.fssdp.groups import ExpertGroups
from sparsetrain.parallel.parallelize import parallelize_experts
from sparsetrain.parallel.world import World


def spread_experts(model: nn.Module, parallel: ParallelConfig, world: World, timeout: timedelta) -> None:
    """Replace the experts of `model` by ones spread over groups of consecutive ranks; collective.

    Call it before `parallelize_data`, which leaves them alone.

    Args:
        model: With MoELayers; on the meta device, or whole.
        parallel: ep or fssdp, over how many ranks, with which options.
        world: The ranks.
        timeout: How long a collective waits for a rank that does not come.
    """
    assert parallel.experts is not None
    mesh = world.mesh(parallel.ep or world.size)
    # A mesh of one dimension says: nothing is replicated.
    groups = ExpertGroups.of_mesh(mesh if mesh.size(0) > 1 else mesh["shard"], timeout=timeout)
    parallelize_experts(model, groups, parallel.experts, parallel.fssdp)

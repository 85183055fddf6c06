"""How a run is laid over ranks: the world that a process joins, and data parallelism applied from outside."""

from sparsetrain.parallel.data_parallel import parallelize_data
from sparsetrain.parallel.expert_parallel import spread_experts
from sparsetrain.parallel.fssdp.controller import MoEController, MoEReport
from sparsetrain.parallel.parallelize import parallelize, parallelize_experts, set_gradient_sync
from sparsetrain.parallel.world import World, join_world

__all__ = [
    "MoEController",
    "MoEReport",
    "World",
    "join_world",
    "parallelize",
    "parallelize_data",
    "parallelize_experts",
    "set_gradient_sync",
    "spread_experts",
]

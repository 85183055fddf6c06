"""How a run is laid over ranks: the world that a process joins, and data parallelism applied from outside."""

from sparsetrain.parallel.data_parallel import parallelize_data
from sparsetrain.parallel.expert_parallel import spread_experts
from sparsetrain.parallel.fssdp.controller import MoEController, MoEReport
from sparsetrain.parallel.fssdp.store import store_parameters
from sparsetrain.parallel.lost_rank import lost_a_rank, told_if_a_rank_is_lost
from sparsetrain.parallel.parallelize import parallelize, parallelize_experts, set_gradient_sync
from sparsetrain.parallel.world import World, join_world

__all__ = [
    "MoEController",
    "MoEReport",
    "World",
    "join_world",
    "lost_a_rank",
    "parallelize",
    "parallelize_data",
    "parallelize_experts",
    "set_gradient_sync",
    "spread_experts",
    "store_parameters",
    "told_if_a_rank_is_lost",
]

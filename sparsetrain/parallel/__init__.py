"""How a run is laid over ranks: the world that a process joins, and data parallelism applied from outside."""

from sparsetrain.parallel.data_parallel import parallelize_data
from sparsetrain.parallel.world import World, join_world

__all__ = ["World", "join_world", "parallelize_data"]

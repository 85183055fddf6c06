"""Where every weight lives: the WeightShard contract, who describes it, and the norm that is true at every layout."""

from sparsetrain.sharding.flat import FlatPartition
from sparsetrain.sharding.names import canonical_modules, canonical_parameters
from sparsetrain.sharding.norm import clip_grads_, global_grad_norm
from sparsetrain.sharding.parameters import reshard, weight_shards
from sparsetrain.sharding.shard import Rectangle, WeightShard

__all__ = [
    "FlatPartition",
    "Rectangle",
    "WeightShard",
    "canonical_modules",
    "canonical_parameters",
    "clip_grads_",
    "global_grad_norm",
    "reshard",
    "weight_shards",
]

"""Where every weight lives: the WeightShard contract, who describes it, and the norm that is true at every layout."""

from sparsetrain.sharding.flat import FlatPartition
from sparsetrain.sharding.gloo_threads import rest_before_exit
from sparsetrain.sharding.moves import Movable, Move, on_move
from sparsetrain.sharding.names import canonical_modules, weight_modules
from sparsetrain.sharding.norm import clip_grads_, global_grad_norm
from sparsetrain.sharding.parameters import reshard, weight_shapes, weight_shards, whole_shape
from sparsetrain.sharding.self_described import DescribesWeights, MomentsOf, PartOfModel, whole_model
from sparsetrain.sharding.shard import Rectangle, WeightShard
from sparsetrain.sharding.stack import Stack

__all__ = [
    "DescribesWeights",
    "FlatPartition",
    "MomentsOf",
    "Movable",
    "Move",
    "PartOfModel",
    "Rectangle",
    "Stack",
    "WeightShard",
    "canonical_modules",
    "clip_grads_",
    "global_grad_norm",
    "on_move",
    "reshard",
    "weight_modules",
    "weight_shapes",
    "weight_shards",
    "whole_model",
    "whole_shape",
]

rest_before_exit()  # here, as nothing below this package has collectives

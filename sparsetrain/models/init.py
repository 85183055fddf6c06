"""Initial weights, the same at every layout: each parameter is a function of (seed, name, shape)."""

from hashlib import blake2b

import torch
from torch import Tensor, nn

from sparsetrain.config.model import ModelConfig
from sparsetrain.sharding import WeightShard, weight_shards


@torch.no_grad()
def initialize_(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a `Transformer`, plain or sharded, in place.

    Matrices and embeddings are normal with standard deviation `init_std`; the projections that write to the residual
    stream (attention.o and `down` of feed-forward networks, experts among them) with init_std/√(2·num_layers), as in
    GPT-2. Norm weights are 1, biases 0. Each weight is drawn whole, in float32 on the CPU, from a generator of its own;
    a rank copies the part it holds.
    """
    for shard in weight_shards(model):
        if shard.local_numel:
            shard.local_weight().copy_(shard.cut(_initial(shard, config, seed)))


def _initial(shard: WeightShard, config: ModelConfig, seed: int) -> Tensor:
    layer = shard.name.removesuffix(".weight")
    if layer.endswith("bias"):
        return torch.zeros(shard.global_shape)
    if layer.endswith("norm"):
        return torch.ones(shard.global_shape)
    into_residual = layer.endswith(("attention.o", ".down"))
    std = config.init_std / (2 * config.num_layers) ** 0.5 if into_residual else config.init_std
    digest = blake2b(f"{seed}:{shard.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.empty(shard.global_shape, dtype=torch.float32).normal_(std=std, generator=generator)

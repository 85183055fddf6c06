"""Sparse upcycling: a trained dense model becomes one with mixtures of experts (arXiv 2212.05055).

Every expert starts as the dense feed-forward network, so that the model computes what it did before, if the weights of
a token's experts add up to a constant (`Router.weight_sum`: softmax_topk and sigmoid_topk with renormalise, hash,
replay). What a dense model does not have, the router, stays as it was initialised; shared experts start with output 0.
Noise and masks make the experts differ from the first step on.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor, nn

from sparsetrain.errors import MoeError
from sparsetrain.moe.routers import Router
from sparsetrain.sharding import WeightShard, canonical_modules, weight_shards
from sparsetrain.sparsity.keys import random_keys

_IN_MOE = re.compile(r"(?P<path>(?:.*\.)?)moe\.(?P<rest>.*)")
_EXPERT = re.compile(r"experts\.\d+\.(?P<part>gate|up|down)(?P<bias>_bias)?")


@dataclass(frozen=True)
class Diversity:
    """How upcycled experts are made to differ; each weight's draw is a function of (seed, its name).

    Raises:
        MoeError: noise is negative, or mask not in [0, 1).
    """

    noise: float = 0.0
    """Standard deviation of Gaussian noise on each weight matrix, in units of the matrix's own."""
    mask: float = 0.0
    """Share of the weights of each matrix that are set to 0, other ones in each expert (EvoMoE, arXiv 2112.14397)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise MoeError(f"noise = {self.noise}: must not be negative")
        if not 0 <= self.mask < 1:
            raise MoeError(f"mask = {self.mask}: must be at least 0 and below 1")


ALIKE = Diversity()
"""All experts of a layer the same: the model's function does not change at all."""


def dense_source(name: str) -> str | None:
    """The weight of the dense model that a weight of the upcycled one starts from; None where it has none.

    layers.0.moe.experts.3.up starts from layers.0.ffn.up.weight; what is not in a MoE layer, from its own like.
    """
    in_moe = _IN_MOE.fullmatch(name)
    if in_moe is None:
        return name
    expert = _EXPERT.fullmatch(in_moe["rest"])
    return f"{in_moe['path']}ffn.{expert['part']}.{'bias' if expert['bias'] else 'weight'}" if expert else None


@torch.no_grad()
def upcycle_(
    model: nn.Module,
    read: Callable[[str], Tensor],
    diversity: Diversity = ALIKE,
    *,
    shards: Sequence[WeightShard] | None = None,
) -> None:
    """Fill a model that has MoE layers, plain or sharded, from a dense one of the same sizes.

    Args:
        model: Initialised; its MoE layers are called `moe` where the dense model has its `ffn`.
        read: From a name to the whole dense weight, on any device; asked once for every weight that this rank holds a
            part of, so for the same one by each expert.
        diversity: How the experts are made to differ.
        shards: Where the model's weights are; default: its parameters.

    Raises:
        MoeError: A dense weight has another shape than what is to start from it.
    """
    routers = {path: module for path, module in canonical_modules(model) if isinstance(module, Router)}
    for shard in weight_shards(model) if shards is None else shards:
        source = dense_source(shard.name)
        if source is not None and shard.local_numel:
            dense = read(source)
            _check_shape(shard, source, dense)
            if source != shard.name:
                router = routers[f"{shard.name.rpartition('.experts.')[0]}.router"]
                dense = _start_of_expert(shard.name, dense.detach().cpu(), router, diversity)
            shard.local_weight().copy_(shard.cut(dense))
        elif "moe.shared.down." in shard.name:
            shard.local_weight().zero_()


def _check_shape(shard: WeightShard, source: str, dense: Tensor) -> None:
    if tuple(dense.shape) != shard.global_shape:
        raise MoeError(
            f"{shard.name} of shape {shard.global_shape} cannot start from {source} of shape {tuple(dense.shape)}: "
            "an upcycled model needs the sizes of the dense one, and moe.ffn_dim its ffn_dim"
        )


def _start_of_expert(name: str, dense: Tensor, router: Router, diversity: Diversity) -> Tensor:
    """A dense weight as the expert's weight `name`."""
    start = dense.clone()
    if start.dim() > 1 and diversity.noise:
        digest = blake2b(f"{diversity.seed}:noise:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        drawn = torch.empty(start.shape, dtype=torch.float32).normal_(generator=generator)
        start += diversity.noise * dense.std() * drawn.to(start.dtype)
    if start.dim() > 1 and diversity.mask:
        keys = random_keys(diversity.seed, name, torch.arange(start.numel()))
        num_zeros = round(diversity.mask * start.numel())
        start.view(-1)[keys.topk(num_zeros, largest=False).indices] = 0
    if router.weight_sum is not None and ".down" in name:
        start /= router.weight_sum
    return start

"""Whole tensors from the parts that ranks hold, for what looks at a weight in both directions."""

import torch
import torch.distributed as dist
from torch import Tensor

from sparsetrain.sharding import WeightShard


def whole_of(shard: WeightShard, local: Tensor) -> Tensor:
    """The tensor of `shard.global_shape` that ranks hold parts of, on every rank; collective over `shard.group`.

    Args:
        shard: Where `local` lies in the whole.
        local: Any dtype that can be summed, of `shard.local_shape`; the whole shares its memory where no rank has more.
    """
    if shard.group is None:
        return local.view(shard.global_shape)
    whole = torch.zeros(shard.global_shape, dtype=local.dtype, device=local.device)
    shard.cut(whole).copy_(local)
    dist.all_reduce(whole, group=shard.group)  # every entry is in one part alone: a sum with zeros is exact
    return whole

"""The true global norm of a gradient that is spread over ranks, and clipping by it."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsetrain.sharding.shard import WeightShard


def global_grad_norm(shards: Sequence[WeightShard]) -> Tensor:
    """L2 norm over the gradients of all weights, each counted once however it is laid out.

    Collective over every group of the shards: all their ranks must call it with the same weights.

    Returns:
        0-d float32 tensor (float64 for a float64 model), the same on all ranks; 0 where nothing has a gradient.
    """
    by_group: dict[ProcessGroup | None, list[Tensor]] = defaultdict(list)
    device = shards[0].local_weight().device if shards else torch.device("cpu")
    for shard in shards:
        grads = by_group[shard.group]  # a rank without gradients must still take part in the sum
        if shard.local_numel and (grad := shard.local_grad()) is not None:
            grads.append(grad)
    exact = torch.float64 if shards and shards[0].local_weight().dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group, grads in by_group.items():
        squares = torch.zeros((), dtype=torch.float64, device=device)
        if grads:
            norms = torch._foreach_norm(grads, 2, dtype=exact)
            squares = torch.stack(list(norms)).double().square().sum()
        if group is not None:
            dist.all_reduce(squares, group=group)
        total = total + squares
    return total.sqrt().to(exact)


def clip_grads_(shards: Sequence[WeightShard], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients by max_norm / norm where norm is larger, without asking the device for its value.

    Args:
        shards: Whose gradients to scale in place.
        max_norm: Largest norm afterwards.
        norm: 0-d tensor from `global_grad_norm`.
    """
    grads = [grad for shard in shards if shard.local_numel and (grad := shard.local_grad()) is not None]
    if grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))

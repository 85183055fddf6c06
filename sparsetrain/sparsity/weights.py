"""A weight that a rule owns, and its mask."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsetrain.sharding import WeightShard
from sparsetrain.sparsity.zeroing import as_bits, zero_


@dataclass(eq=False)
class SparseWeight:
    """One owned weight on this rank."""

    shard: WeightShard
    bits: Tensor
    """The mask: int8, −1 for weights that live and 0 for zeroed ones, of `shard.local_shape`."""
    nonzeros: int
    """Weights that live, over the whole weight."""
    flips: int = 0
    """Mask entries that the latest mask update changed, over the whole weight."""
    unseen_factor: float = 0.0
    """What the forward pass multiplies weights with that the mask leaves out."""

    @classmethod
    def dense(cls, shard: WeightShard) -> "SparseWeight":
        """With nothing zeroed."""
        weight = shard.local_weight()
        return cls(shard, torch.full(weight.shape, -1, dtype=torch.int8, device=weight.device), shard.global_numel)

    @property
    def multiplied(self) -> int:
        """Weights that the forward pass multiplies with: all of them while the others fade out."""
        return self.shard.global_numel if self.unseen_factor else self.nonzeros

    @property
    def is_dense(self) -> bool:
        """Whether nothing is zeroed."""
        return self.nonzeros == self.shard.global_numel

    def zero_gradient(self) -> None:
        """Zero the gradient of zeroed weights."""
        grad = self.shard.local_grad()
        if grad is not None and not self.is_dense:
            zero_([grad], self.bits)

    def zero_weight(self) -> None:
        """Zero the zeroed weights, in the optimizer's copy too where it has one."""
        if self.is_dense:
            return
        weight, master = self.shard.local_weight(), self.shard.local_master()
        zero_([weight] if master.data_ptr() == weight.data_ptr() else [weight, master], self.bits)

    def zero_moments(self) -> None:
        """Zero the optimizer's state of zeroed weights."""
        if not self.is_dense:
            zero_(self.shard.local_moments().values(), self.bits)


def update_masks(weights: Sequence[SparseWeight], masks: Sequence[Tensor], *, count_flips: bool = True) -> None:
    """Give weights new masks (bool, of `local_shape`) and count what lives and what changed; one sum per group."""
    by_group: dict[ProcessGroup | None, list[tuple[SparseWeight, Tensor]]] = defaultdict(list)
    for weight, mask in zip(weights, masks, strict=True):
        bits = as_bits(mask.to(weight.bits.device))
        counts = torch.stack([torch.count_nonzero(bits), torch.count_nonzero(bits != weight.bits)])
        weight.bits = bits
        by_group[weight.shard.group].append((weight, counts))
    for group, counted in by_group.items():
        total = torch.stack([counts for _, counts in counted])
        if group is not None:
            dist.all_reduce(total, group=group)
        for (weight, _), (nonzeros, flips) in zip(counted, total.tolist(), strict=True):
            weight.nonzeros, weight.flips = nonzeros, flips if count_flips else 0

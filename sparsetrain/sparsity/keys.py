"""Keys: importance as integers that depend on a weight's value or place alone, never on the layout.

A larger key is kept before a smaller one. Key 0 is for units that may not be kept; the others have at least 1.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sparsetrain.errors import TrainingError
from sparsetrain.sharding import WeightShard

_INFINITY = torch.tensor(math.inf, dtype=torch.float64).view(torch.int64).item()
_INT64_MAX = 2**63 - 1


def magnitude_keys(values: Tensor) -> Tensor:
    """Order finite floats by magnitude, exactly: |x| read as an integer, plus 1.

    Args:
        values: bf16 and fp16 are widened to fp32, which loses nothing.

    Returns:
        int32 below 2^31 − 1, or int64 below 2^63 − 1 for float64 values; equal keys exactly for equal magnitudes.
    """
    if values.dtype == torch.float64:
        return (values.view(torch.int64) & _INT64_MAX).add_(1)
    return (values.float().view(torch.int32) & (2**31 - 1)).add_(1)


def random_keys(seed: int, name: str, index: Tensor) -> Tensor:
    """Pseudo-random keys, a function of (seed, weight name, index) alone: splitmix64 at position `index`.

    Args:
        seed: Of the run.
        name: Of the weight; different names give independent keys.
        index: int64 global indices.

    Returns:
        int32 in [1, 2^30], of index's shape.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    state = index * _as_int64(0x9E3779B97F4A7C15) + int.from_bytes(digest, "little", signed=True)
    state.bitwise_xor_(_shift_right(state, 30)).mul_(_as_int64(0xBF58476D1CE4E5B9))
    state.bitwise_xor_(_shift_right(state, 27)).mul_(_as_int64(0x94D049BB133111EB))
    return _shift_right(state.bitwise_xor_(_shift_right(state, 31)), 34).int().add_(1)


def largest_magnitudes(shards: Sequence[WeightShard], values: Sequence[Tensor]) -> list[float]:
    """Largest |value| of each whole weight, the same on all ranks; collective over the shards' groups.

    Raises:
        TrainingError: On all ranks, when a weight holds NaN or infinity.
    """
    by_group: dict[ProcessGroup | None, list[int]] = defaultdict(list)
    for at, shard in enumerate(shards):
        by_group[shard.group].append(at)
    found = [0.0] * len(shards)
    for group, members in by_group.items():
        # As integers non-negative floats keep their order and NaN is the largest, which a float maximum would lose.
        largest = torch.stack([_largest(values[at]) for at in members]).view(torch.int64)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        bad = [shards[at].name for at, bits in zip(members, largest.tolist(), strict=True) if bits >= _INFINITY]
        if bad:
            raise TrainingError(
                f"{bad[0]} holds NaN or infinite weights ({len(bad)} of {len(shards)} weights do), so no mask can be "
                "chosen; training has diverged: go back to an earlier checkpoint with a lower optimizer.lr"
            )
        for at, value in zip(members, largest.view(torch.float64).tolist(), strict=True):
            found[at] = value
    return found


def fixed_point(values: Tensor, largest: float, bits: int) -> Tensor:
    """|values| as int64 multiples of one power of two, `largest` taking at most `bits` bits; sums of them are exact.

    What is smaller than about largest · 2^−bits becomes 0.
    """
    exponent = max(math.frexp(largest)[1], -900)  # 2^(bits − exponent) must not overflow
    return (values.double().abs() * math.ldexp(1.0, bits - exponent)).long()


def _largest(values: Tensor) -> Tensor:
    """Float64 0-d; NaN where there is one, without sign."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high).double().abs()


def _as_int64(unsigned: int) -> int:
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


def _shift_right(values: Tensor, by: int) -> Tensor:
    """Logical shift: int64 `>>` copies the sign bit in from the left, and that must go."""
    return (values >> by).bitwise_and_(2 ** (64 - by) - 1)

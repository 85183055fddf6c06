"""Distributions: how many units of each weight are kept. Pure arithmetic.

Rounding is part of the definition, so that numbers of non-zeros are exact everywhere: n units at sparsity s have
⌊s·n + 1/2⌋ zeros. Uniform rounds each weight by itself; ERK and global round the total once, and ERK hands the
remainder to the weights that lost the largest fractions, earlier ones first.
"""

from collections.abc import Sequence
from math import floor, prod

import numpy as np
from numpy.typing import ArrayLike, NDArray


def num_kept(size: int, sparsity: float) -> int:
    """Units kept of `size` at a sparsity: all but ⌊s·n + 1/2⌋."""
    return size - floor(sparsity * size + 0.5)


def erk_densities(shapes: Sequence[tuple[int, ...]], sparsity: ArrayLike) -> NDArray[np.float64]:
    """Erdős–Rényi-kernel densities: density_l = min(1, ε·Σdims/Πdims), with ε such that the total is 1 − sparsity.

    Evci et al., arXiv 1911.11134. What is kept over all weights, Σ min(Πdims, ε·Σdims), is a line in ε that bends
    where a weight becomes dense; solving it between two bends is what freezing dense weights and solving again finds.

    Args:
        shapes: Of the weights.
        sparsity: Over all weights; a number or an array of any shape [...].

    Returns:
        [..., weight].
    """
    sizes = np.array([prod(shape) for shape in shapes], dtype=np.float64)
    dims = np.array([sum(shape) for shape in shapes], dtype=np.float64)
    bends = np.sort([0.0, *(sizes / dims)])
    kept = np.minimum(sizes, bends[:, None] * dims).sum(1)
    epsilon = np.interp((1 - np.asarray(sparsity)) * sizes.sum(), kept, bends)
    densities: NDArray[np.float64] = np.minimum(1.0, np.multiply.outer(epsilon, dims / sizes))
    return densities


def keep_uniform(sizes: Sequence[int], sparsity: float, available: Sequence[int]) -> list[int]:
    """The same sparsity for every weight, as far as its `available` units go."""
    return [min(num_kept(size, sparsity), most) for size, most in zip(sizes, available, strict=True)]


def keep_erk(
    shapes: Sequence[tuple[int, ...]], sizes: Sequence[int], sparsity: float, available: Sequence[int]
) -> list[int]:
    """ERK counts that add up to what a global threshold would keep.

    Args:
        shapes: Of the weights, which the densities follow from.
        sizes: Units of each weight.
        sparsity: Over all weights.
        available: The most that each weight can keep.
    """
    wanted = (erk_densities(shapes, sparsity) * sizes).tolist()
    keep = [min(floor(share), most) for share, most in zip(wanted, available, strict=True)]
    missing = keep_global(sizes, sparsity, available) - sum(keep)
    order = sorted(range(len(sizes)), key=lambda at: (floor(wanted[at]) - wanted[at], at))
    while missing > 0:
        for at in (at for at in order if keep[at] < available[at]):
            keep[at] += 1
            missing -= 1
            if missing == 0:
                break
    return keep


def keep_global(sizes: Sequence[int], sparsity: float, available: Sequence[int]) -> int:
    """Units kept over all weights together."""
    return min(num_kept(sum(sizes), sparsity), sum(available))


def keep_floors(sizes: Sequence[int], floor_density: float, available: Sequence[int]) -> list[int]:
    """⌊floor · n⌋ units that each weight keeps whatever the global threshold."""
    return [min(floor(floor_density * size), most) for size, most in zip(sizes, available, strict=True)]

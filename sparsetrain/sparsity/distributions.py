"""Distributions: how many units of each weight are kept. Pure arithmetic.

Rounding is part of the definition, so that numbers of non-zeros are exact everywhere: n units at sparsity s have
⌊s·n + 1/2⌋ zeros. Uniform rounds each weight by itself; ERK and global round the total once, and ERK hands the
remainder to the weights that lost the largest fractions, earlier ones first.
"""

from collections.abc import Sequence
from math import floor, prod


def num_kept(size: int, sparsity: float) -> int:
    """Units kept of `size` at a sparsity: all but ⌊s·n + 1/2⌋."""
    return size - floor(sparsity * size + 0.5)


def erk_densities(shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[float]:
    """Erdős–Rényi-kernel densities: density_l = min(1, ε·Σdims/Πdims), with ε such that the total is 1 − sparsity.

    Evci et al., arXiv 1911.11134; weights that would exceed 1 are dense, and ε is solved again over the others.
    """
    sizes = [prod(shape) for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        sparse = [at for at in range(len(shapes)) if at not in dense]
        target = (1 - sparsity) * sum(sizes) - sum(sizes[at] for at in dense)
        epsilon = target / sum(sum(shapes[at]) for at in sparse)
        above = {at for at in sparse if epsilon * sum(shapes[at]) > sizes[at]}
        if not above:
            return [1.0 if at in dense else epsilon * sum(shapes[at]) / sizes[at] for at in range(len(shapes))]
        dense |= above
    return [1.0] * len(shapes)


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
    wanted = [density * size for density, size in zip(erk_densities(shapes, sparsity), sizes, strict=True)]
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

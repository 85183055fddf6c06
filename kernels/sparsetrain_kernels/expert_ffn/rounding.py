"""Rows of experts rounded up to whole tiles, so that matrix products repeat their shapes from one step to the next.

oneDNN, which runs torch's bf16 products on CPUs, compiles code for every shape that it meets and keeps the latest 1024.
As routers move rows between experts, nearly every product of a training step would have a shape of its own: compiling
costs a sixth of the products' time, and the code a gigabyte.

Shapes: R rows, E experts, P ≥ R rows with those that fill up; the last are unused.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS = 64
"""What the rows of an expert become a multiple of."""


class RoundedRows(NamedTuple):
    """Rows of experts, some of which repeat another with weight 0: they add nothing to results and gradients."""

    token_P: Tensor
    """int64, the token of each row."""
    weight_P: Tensor
    """Its weight."""
    counts: Sequence[int]
    """Rows of each expert."""
    place_R: Tensor | None
    """int64, where the given rows are among them; None where they are the same."""


def num_rounded_rows(num_rows: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> int:
    """Memory to take for them in rows, P: what is needed at most, as shapes may not depend on counts."""
    return num_rows + (num_experts * (TILE_ROWS - 1) if _compiles_products(dtype, device) else 0)


def round_rows(token_R: Tensor, weight_R: Tensor, counts: Sequence[int], dtype: torch.dtype) -> RoundedRows:
    """Fill up each expert's rows with copies of its last, where products in `dtype` are compiled for their shape.

    Raises:
        ValueError: The counts do not add up to R.
    """
    check_counts(counts, len(token_R))
    if not _compiles_products(dtype, token_R.device):
        return RoundedRows(token_R, weight_R, counts, None)
    rounded = [-(-count // TILE_ROWS) * TILE_ROWS for count in counts]
    first, count = torch.tensor([[0, *accumulate(counts)][:-1], list(counts)])
    size = torch.tensor(rounded)
    begin = size.cumsum(0) - size
    within_P = torch.arange(sum(rounded)) - begin.repeat_interleave(size)
    count_P = count.repeat_interleave(size)
    row_P = first.repeat_interleave(size) + torch.minimum(within_P, count_P - 1)
    place_R = torch.arange(len(token_R)) + (begin - first).repeat_interleave(count)
    weight_P = weight_R.index_select(0, row_P).masked_fill_(within_P >= count_P, 0)
    return RoundedRows(token_R.index_select(0, row_P), weight_P, rounded, place_R)


def check_counts(counts: Sequence[int], num_rows: int) -> None:
    """Raise ValueError where the rows of all experts are not R."""
    if sum(counts) != num_rows:
        raise ValueError(f"counts add up to {sum(counts)} rows, and there are {num_rows}")


def _compiles_products(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype.itemsize == 2

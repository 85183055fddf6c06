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


class Tiles(NamedTuple):
    """Where rows are once each expert's are filled up to whole tiles, with copies of its last one."""

    counts: Sequence[int]
    """Rows of each expert."""
    row_P: Tensor | None
    """int64, which of the given rows each is; None where nothing is filled up."""
    is_copy_P: Tensor | None
    """bool, whether it fills up."""
    place_R: Tensor | None
    """int64, where the given rows are among them."""

    def spread(self, rows_R: Tensor) -> Tensor:
        """The rows [R, ...] with those that fill up: [P, ...]."""
        return rows_R if self.row_P is None else rows_R.index_select(0, self.row_P)

    def spread_with_zeros(self, rows_R: Tensor) -> Tensor:
        """The same, filled up with zeros: for weights and gradients, so that copies add nothing to any sum."""
        if self.row_P is None or self.is_copy_P is None:
            return rows_R
        is_copy = self.is_copy_P.view(-1, *[1] * (rows_R.dim() - 1))
        return rows_R.index_select(0, self.row_P).masked_fill_(is_copy, 0)

    def collect(self, rows_P: Tensor) -> Tensor:
        """The given rows again: [R, ...]."""
        return rows_P if self.place_R is None else rows_P.index_select(0, self.place_R)


def num_rounded_rows(num_rows: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> int:
    """Memory to take for them in rows, P: what is needed at most, as shapes may not depend on counts."""
    return num_rows + (num_experts * (TILE_ROWS - 1) if _compiles_products(dtype, device) else 0)


def whole_tiles(counts: Sequence[int], num_rows: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Fill up each expert's rows, where products in `dtype` are compiled for their shape.

    Args:
        counts: Rows of each expert.
        num_rows: R.
        dtype: What products run in.
        device: Where.

    Raises:
        ValueError: The counts do not add up to R.
    """
    check_counts(counts, num_rows)
    if not _compiles_products(dtype, device):
        return Tiles(counts, None, None, None)
    rounded = [-(-count // TILE_ROWS) * TILE_ROWS for count in counts]
    first, count = torch.tensor([[0, *accumulate(counts)][:-1], list(counts)])
    size = torch.tensor(rounded)
    begin = size.cumsum(0) - size
    within_P = torch.arange(sum(rounded)) - begin.repeat_interleave(size)
    count_P = count.repeat_interleave(size)
    row_P = first.repeat_interleave(size) + torch.minimum(within_P, count_P - 1)
    place_R = torch.arange(num_rows) + (begin - first).repeat_interleave(count)
    return Tiles(rounded, row_P, within_P >= count_P, place_R)


def check_counts(counts: Sequence[int], num_rows: int) -> None:
    """Raise ValueError where the rows of all experts are not R."""
    if sum(counts) != num_rows:
        raise ValueError(f"counts add up to {sum(counts)} rows, and there are {num_rows}")


def _compiles_products(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype.itemsize == 2

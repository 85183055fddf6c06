"""The three products on a CPU: per row (or column) of blocks, one dense product of what its living blocks read.

Columns of x are copied side by side into one buffer, which stays in cache, so that each row of blocks is a single
matrix product that accumulates in fp32 and writes its outputs in place. The copies cost about a tenth of the products.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.layout import Grid, by_block, unpack_index
from sparsetrain_kernels.memory import new_result

_CACHE_BYTES = 1 << 20
_FEWEST_TOKENS = 256


def output(x_TK: Tensor, weight: Tensor, bias_N: Tensor | None, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """x Wᵀ + bias [T, N]; `zeroed` makes no difference, dead blocks are not read."""
    blocks = _Blocks(weight, index, grid)
    y_TN = new_result(x_TK, len(x_TK), grid.shape[0])
    rows = [blocks.of_row(row) for row in range(grid.num_rows)]
    joined = [torch.cat(living, 1).T if living else None for living, _ in rows]
    biases = [None] * grid.num_rows if bias_N is None else bias_N.tensor_split(grid.num_rows)
    for tokens, gathered in _slices(x_TK, grid.block_columns * blocks.widest_row):
        inputs = x_TK[tokens].tensor_split(grid.num_columns, 1)
        outputs = y_TN[tokens].tensor_split(grid.num_rows, 1)
        for (_, columns), w_Pr, bias_r, y_tr in zip(rows, joined, biases, outputs, strict=True):
            if w_Pr is None:
                y_tr.copy_(y_tr.new_zeros(()) if bias_r is None else bias_r)
            else:
                _product(gathered.beside([inputs[column] for column in columns]), w_Pr, bias_r, y_tr)
    return y_TN


def input_gradient(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """dy W [T, K]."""
    blocks = _Blocks(weight, index, grid)
    dx_TK = new_result(dy_TN, len(dy_TN), grid.shape[1])
    columns = [blocks.of_column(column) for column in range(grid.num_columns)]
    joined = [torch.cat(living, 0) if living else None for living, _ in columns]
    for tokens, gathered in _slices(dy_TN, grid.block_rows * blocks.widest_column):
        outputs = dy_TN[tokens].tensor_split(grid.num_rows, 1)
        inputs = dx_TK[tokens].tensor_split(grid.num_columns, 1)
        for (_, rows), w_Pc, dx_tc in zip(columns, joined, inputs, strict=True):
            if w_Pc is None:
                dx_tc.zero_()
            else:
                _product(gathered.beside([outputs[row] for row in rows]), w_Pc, None, dx_tc)
    return dx_TK


def weight_gradient(dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: Grid, packed: bool) -> Tensor:
    """The living blocks of dyᵀ x, packed or in a dense tensor of zeros.

    Column by column: the transposed product with many rows and few columns is the faster way round in bf16.
    """
    num_blocks = len(unpack_index(index, grid).columns)
    shape = (num_blocks, *grid[2:]) if packed else grid.shape
    gradient = dy_TN.new_empty(shape) if packed else dy_TN.new_zeros(shape)
    blocks = _Blocks(gradient, index, grid)
    outputs = dy_TN.tensor_split(grid.num_rows, 1)
    gathered_dy = _Buffer(dy_TN, len(dy_TN) * grid.block_rows * blocks.widest_column)
    for column, x_Tc in enumerate(x_TK.tensor_split(grid.num_columns, 1)):
        living, rows = blocks.of_column(column)
        if rows:
            dy = gathered_dy.beside([outputs[row] for row in rows])
            torch._foreach_copy_(living, list((dy.T @ x_Tc).tensor_split(len(rows))))
    return gradient


class _Blocks:
    """Views [r, c] of the living blocks of a dense or packed weight, by row and by column of blocks."""

    def __init__(self, weight: Tensor, index: Tensor, grid: Grid) -> None:
        row_starts, self.columns, column_starts, self.rows, self.order = (
            part.tolist() for part in unpack_index(index, grid)
        )
        self.row_slices: list[slice[int, int, None]] = [slice(start, stop) for start, stop in pairwise(row_starts)]
        self.column_slices: list[slice[int, int, None]] = [
            slice(start, stop) for start, stop in pairwise(column_starts)
        ]
        self.packed = weight.unbind() if weight.ndim == 3 else None
        self.by_place = by_block(weight, grid) if weight.ndim == 2 else weight

    @property
    def widest_row(self) -> int:
        return max(part.stop - part.start for part in self.row_slices)

    @property
    def widest_column(self) -> int:
        return max(part.stop - part.start for part in self.column_slices)

    def of_row(self, row: int) -> tuple[list[Tensor], list[int]]:
        """Its living blocks, and their columns."""
        columns = self.columns[self.row_slices[row]]
        if self.packed is not None:
            return list(self.packed[self.row_slices[row]]), columns
        blocks = self.by_place[row].unbind(0)
        return [blocks[column] for column in columns], columns

    def of_column(self, column: int) -> tuple[list[Tensor], list[int]]:
        """Its living blocks, and their rows."""
        rows = self.rows[self.column_slices[column]]
        if self.packed is not None:
            return [self.packed[number] for number in self.order[self.column_slices[column]]], rows
        blocks = self.by_place[:, column].unbind(0)
        return [blocks[row] for row in rows], rows


class _Buffer:
    """Memory that columns are copied into side by side, again and again; a single block is used where it lies."""

    def __init__(self, like: Tensor, numel: int) -> None:
        self.memory = new_result(like, numel)

    def beside(self, blocks: list[Tensor]) -> Tensor:
        """Blocks of equal height beside one another."""
        if len(blocks) == 1:
            return blocks[0]
        height, width = len(blocks[0]), sum(block.shape[1] for block in blocks)
        return torch.cat(blocks, 1, out=self.memory[: height * width].view(height, width))


def _slices(like_TX: Tensor, width: int) -> Iterator[tuple[slice, _Buffer]]:
    """Tokens, so many at a time that `width` columns of them stay in cache, and the memory for those columns."""
    size = max(_FEWEST_TOKENS, _CACHE_BYTES // max(width * like_TX.itemsize, 1))
    gathered = _Buffer(like_TX, min(size, len(like_TX)) * width)
    return ((slice(start, start + size), gathered) for start in range(0, len(like_TX), size))


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)

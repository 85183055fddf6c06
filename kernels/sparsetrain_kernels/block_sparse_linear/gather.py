"""The three products on a CPU: per row (or column) of blocks, one dense product of what its living blocks read.

Columns of x are copied side by side into one buffer, which stays in cache, so that each row of blocks is a single
matrix product that accumulates in fp32 and writes its outputs in place. The copies cost about a tenth of the products.
"""

from itertools import pairwise

import torch
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.layout import Grid, by_block, unpack_index


def output(x_TK: Tensor, weight: Tensor, bias_N: Tensor | None, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """x Wᵀ + bias [T, N]; `zeroed` makes no difference, dead blocks are not read."""
    blocks = _Blocks(weight, index, grid)
    y_TN = x_TK.new_empty(len(x_TK), grid.shape[0])
    inputs = x_TK.tensor_split(grid.num_columns, 1)
    gathered_x = _Buffer(x_TK, len(x_TK) * grid.block_columns * blocks.widest_row)
    gathered_w = _Buffer(weight, grid.block_rows * grid.block_columns * blocks.widest_row)
    for row, y_Tr in enumerate(y_TN.tensor_split(grid.num_rows, 1)):
        living, columns = blocks.of_row(row)
        bias_r = None if bias_N is None else bias_N[row * grid.block_rows : (row + 1) * grid.block_rows]
        if columns:
            x = gathered_x.beside([inputs[column] for column in columns])
            _product(x, gathered_w.beside(living).T, bias_r, y_Tr)
        else:
            y_Tr.copy_(y_Tr.new_zeros(()) if bias_r is None else bias_r)
    return y_TN


def input_gradient(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """dy W [T, K]."""
    blocks = _Blocks(weight, index, grid)
    dx_TK = dy_TN.new_empty(len(dy_TN), grid.shape[1])
    outputs = dy_TN.tensor_split(grid.num_rows, 1)
    gathered_dy = _Buffer(dy_TN, len(dy_TN) * grid.block_rows * blocks.widest_column)
    gathered_w = _Buffer(weight, grid.block_rows * grid.block_columns * blocks.widest_column)
    for column, dx_Tc in enumerate(dx_TK.tensor_split(grid.num_columns, 1)):
        living, rows = blocks.of_column(column)
        if rows:
            dy = gathered_dy.beside([outputs[row] for row in rows])
            _product(dy, gathered_w.below(living), None, dx_Tc)
        else:
            dx_Tc.zero_()
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
    """Memory that blocks are copied into side by side, again and again; a single block is used where it lies."""

    def __init__(self, like: Tensor, numel: int) -> None:
        self.memory = like.new_empty(numel)

    def beside(self, blocks: list[Tensor]) -> Tensor:
        """Blocks of equal height beside one another."""
        return blocks[0] if len(blocks) == 1 else self._join(blocks, len(blocks[0]), sum(b.shape[1] for b in blocks), 1)

    def below(self, blocks: list[Tensor]) -> Tensor:
        """Blocks of equal width below one another."""
        return blocks[0] if len(blocks) == 1 else self._join(blocks, sum(map(len, blocks)), blocks[0].shape[1], 0)

    def _join(self, blocks: list[Tensor], height: int, width: int, dim: int) -> Tensor:
        joined = self.memory[: height * width].view(height, width)
        return torch.cat(blocks, dim, out=joined)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)

"""The three products on a CPU, which read and compute the living blocks alone.

B living blocks are kept as P = B·r pieces, each of the c neighbouring values that are one row of one block.

Each row (or column) of blocks is one product, which accumulates in fp32 inside and writes its outputs in place. All
that it reads is copied side by side first, by one index_select on all cores; what is side by side already is read where
it is. Activations that are stored tokens last are copied in whole slabs, others piece by piece. Wide blocks of float32
and float64 are products of their own instead, added up in place: that rounds nothing more, and copies nothing.
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.layout import BlockLists, Grid, unpack_index
from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.tokens_last import are_tokens_last, new_tokens

# Tokens are taken in parts, so that what a product reads is in cache when it, or a later one, reads it again.
_READ_BYTES = 8 << 20
_GATHERED_BYTES = 2 << 20
_FEWEST_TOKENS = 256
_WIDE = 128


def output(
    x_TK: Tensor, weight: Tensor, bias_N: Tensor | None, index: Tensor, grid: Grid, zeroed: bool, tokens_last: bool
) -> Tensor:
    """x Wᵀ + bias [T, N]; `zeroed` makes no difference, dead blocks are not read."""
    lists = unpack_index(index, grid)
    reads = _Reads(x_TK, grid.block_columns, lists.row_starts, lists.columns)
    blocks_Brc = _select(weight, _pieces(lists, grid, weight.ndim == 3), grid, x_TK.dtype)
    return _products(reads, blocks_Brc.transpose(1, 2), bias_N, tokens_last)


def input_gradient(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: Grid, zeroed: bool, tokens_last: bool) -> Tensor:
    """dy W [T, K]."""
    lists = unpack_index(index, grid)
    reads = _Reads(dy_TN, grid.block_rows, lists.column_starts, lists.rows)
    blocks_Brc = _select(weight, _pieces(lists, grid, weight.ndim == 3)[lists.order], grid, dy_TN.dtype)
    return _products(reads, blocks_Brc, None, tokens_last)


def weight_gradient(dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: Grid, packed: bool, dtype: torch.dtype) -> Tensor:
    """The living blocks of dyᵀ x, packed or in a dense tensor of zeros.

    Row by row or column by column of blocks, whichever makes fewer and larger products: many rows, few columns.
    """
    lists = unpack_index(index, grid)
    pieces_Br = _pieces(lists, grid, packed)
    if grid.num_rows < grid.num_columns:
        reads = _Reads(x_TK, grid.block_columns, lists.row_starts, lists.columns)
        blocks_Brc = _block_products(reads, dy_TN, grid.block_rows).transpose(1, 2)
    else:
        reads = _Reads(dy_TN, grid.block_rows, lists.column_starts, lists.rows)
        blocks_Brc = _block_products(reads, x_TK, grid.block_columns)
        pieces_Br = pieces_Br[lists.order]
    return _placed(blocks_Brc, pieces_Br.flatten(), grid, packed, dtype)


def _block_products(reads: "_Reads", others_TY: Tensor, width: int) -> Tensor:
    """What each product reads, transposed, times its slab of `width` columns of another matrix: blocks [B, x, y]."""
    products_By = others_TY.new_empty(sum(reads.counts) * reads.width, width)
    parts = torch.split(products_By, [count * reads.width for count in reads.counts])
    beside = _Beside(reads, len(others_TY))
    for product, (part, others_Ty) in enumerate(zip(parts, torch.split(others_TY, width, 1), strict=True)):
        if len(part):
            torch.mm(beside(product, reads.matrix_TX).T, others_Ty, out=part)
    return products_By.view(-1, reads.width, width)


def _placed(blocks_Brc: Tensor, pieces_P: Tensor, grid: Grid, packed: bool, dtype: torch.dtype) -> Tensor:
    """Blocks whose pieces belong to these places of a gradient: packed, or in a dense tensor of zeros."""
    found_Pc = blocks_Brc.new_empty(len(pieces_P) + 1, grid.block_columns, dtype=dtype)
    found_Pc[:-1].view(blocks_Brc.shape).copy_(blocks_Brc)
    found_Pc[-1] = 0  # the piece that dead blocks get
    gradient = new_result(blocks_Brc, *(blocks_Brc.shape if packed else grid.shape), dtype=dtype)
    sources = pieces_P.new_full((gradient.numel() // grid.block_columns,), len(pieces_P))
    sources[pieces_P] = torch.arange(len(pieces_P), dtype=sources.dtype)
    torch.index_select(found_Pc, 0, sources, out=gradient.view(-1, grid.block_columns))
    return gradient


class _Reads:
    """What each product reads of a matrix [T, X]: some of its slabs, which are `width` columns wide."""

    def __init__(self, matrix_TX: Tensor, width: int, starts: Tensor, slabs_B: Tensor) -> None:
        self.matrix_TX, self.width = matrix_TX, width
        self.counts: list[int] = starts.diff().tolist()
        self.slabs = torch.split(slabs_B, self.counts)
        self.tokens_last = are_tokens_last(matrix_TX)

    def tokens_within(self, most_bytes: int, columns: int) -> int:
        """How many tokens to take at a time to hold so many columns of them in so many bytes: equal parts of all.

        All, where they are stored last: parts of them would be pieces again.
        """
        if self.tokens_last:
            return max(len(self.matrix_TX), 1)
        most = max(_FEWEST_TOKENS, most_bytes // max(columns * self.matrix_TX.itemsize, 1))
        num_parts = ceil(len(self.matrix_TX) / most)
        return ceil(len(self.matrix_TX) / max(num_parts, 1)) or 1


class _Beside:
    """Calls give the slabs that a product reads side by side, of at most so many tokens at a time."""

    def __init__(self, reads: _Reads, most_tokens: int) -> None:
        self.reads = reads
        self.firsts = [_first_of_run(slabs.tolist()) for slabs in reads.slabs]
        self.memory = new_result(reads.matrix_TX, most_tokens * max(reads.counts), reads.width)
        num_slabs = reads.matrix_TX.shape[1] // reads.width
        self.first_T1 = torch.arange(most_tokens, dtype=torch.int32)[:, None] * num_slabs

    def __call__(self, product: int, tokens_TX: Tensor) -> Tensor:
        """Those of some of the matrix's tokens: a view where they are neighbours, otherwise valid until the next."""
        width, count, first = self.reads.width, self.reads.counts[product], self.firsts[product]
        if first is not None:
            return tokens_TX[:, first * width : (first + count) * width]
        slabs, gathered = self.reads.slabs[product], self.memory[: len(tokens_TX) * count]
        if self.reads.tokens_last:  # a slab is one piece
            by_slab = tokens_TX.T.view(-1, width * len(tokens_TX))
            torch.index_select(by_slab, 0, slabs, out=gathered.view(count, -1))
            return gathered.view(count * width, len(tokens_TX)).T
        # Numbers of pieces are made when they are needed: those of all products may be many times the activations.
        pieces = (self.first_T1[: len(tokens_TX)] + slabs).view(-1)
        torch.index_select(tokens_TX.view(-1, width), 0, pieces, out=gathered)
        return gathered.view(len(tokens_TX), count * width)


def _products(reads: _Reads, blocks_Bxy: Tensor, bias_Y: Tensor | None, tokens_last: bool) -> Tensor:
    """Outputs [T, Y], y columns from each product: its slabs of x columns each times its blocks, plus bias."""
    num_tokens, width = len(reads.matrix_TX), blocks_Bxy.shape[2]
    out_TY = new_tokens(reads.matrix_TX, num_tokens, width * len(reads.counts), tokens_last)
    for product, count in enumerate(reads.counts):
        if not count:
            bias_y = 0 if bias_Y is None else bias_Y[product * width : (product + 1) * width]
            out_TY[:, product * width : (product + 1) * width] = bias_y
    whole_precision = reads.matrix_TX.dtype in (torch.float32, torch.float64)
    write = _write_accumulated if whole_precision and reads.width >= _WIDE else _write_gathered
    write(out_TY, reads, blocks_Bxy, bias_Y)
    return out_TY


def _write_gathered(out_TY: Tensor, reads: _Reads, blocks_Bxy: Tensor, bias_Y: Tensor | None) -> None:
    """One product for all blocks of an output; in bf16, oneDNN is fastest where the rows of both operands are whole."""
    width = blocks_Bxy.shape[2]
    matrices = [part.view(-1, width) for part in torch.split(blocks_Bxy.contiguous(), reads.counts)]
    at_a_time = reads.tokens_within(_GATHERED_BYTES, max(reads.counts) * reads.width)
    beside = _Beside(reads, at_a_time)
    for product, tokens_TX, out_Ty, bias_y in _parts(out_TY, reads, width, bias_Y, at_a_time):
        if bias_y is None:
            torch.mm(beside(product, tokens_TX), matrices[product], out=out_Ty)
        else:
            torch.addmm(bias_y, beside(product, tokens_TX), matrices[product], out=out_Ty)


def _write_accumulated(out_TY: Tensor, reads: _Reads, blocks_Bxy: Tensor, bias_Y: Tensor | None) -> None:
    """One product for each block, added to those before it."""
    blocks = torch.split(blocks_Bxy, reads.counts)
    slabs = [part.tolist() for part in reads.slabs]
    at_a_time = reads.tokens_within(_READ_BYTES, reads.matrix_TX.shape[1])
    for product, tokens_TX, out_Ty, bias_y in _parts(out_TY, reads, blocks_Bxy.shape[2], bias_Y, at_a_time):
        so_far, keep = (out_Ty, 0) if bias_y is None else (bias_y, 1)
        for slab, block_xy in zip(slabs[product], blocks[product], strict=True):
            tokens_Tx = tokens_TX[:, slab * reads.width : (slab + 1) * reads.width]
            torch.addmm(so_far, tokens_Tx, block_xy, beta=keep, out=out_Ty)
            so_far, keep = out_Ty, 1


def _parts(
    out_TY: Tensor, reads: _Reads, width: int, bias_Y: Tensor | None, at_a_time: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """For some tokens at a time, each product that reads any: its number, the tokens, its outputs of them, its bias."""
    biases = [None] * len(reads.counts) if bias_Y is None else torch.split(bias_Y, width)
    for tokens_TX, out in zip(torch.split(reads.matrix_TX, at_a_time), torch.split(out_TY, at_a_time), strict=True):
        for product, (out_Ty, bias_y) in enumerate(zip(torch.split(out, width, 1), biases, strict=True)):
            if reads.counts[product]:
                yield product, tokens_TX, out_Ty, bias_y


def _pieces(lists: BlockLists, grid: Grid, packed: bool) -> Tensor:
    """Where the pieces of each living block are among those of a weight, int32 [B, r]."""
    within_r = torch.arange(grid.block_rows, dtype=torch.int32)
    if packed:
        blocks = torch.arange(len(lists.columns), dtype=torch.int32)
        return blocks[:, None] * grid.block_rows + within_r
    rows, columns = lists.places()
    return (rows * (grid.block_rows * grid.num_columns) + columns)[:, None] + within_r * grid.num_columns


def _select(weight: Tensor, pieces_Br: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Blocks of a dense or packed weight in the dtype of the computation [B, r, c]."""
    return weight.view(-1, grid.block_columns).index_select(0, pieces_Br.flatten()).to(dtype).view(-1, *grid[2:])


def _first_of_run(slabs: list[int]) -> int | None:
    """The first of slabs that are neighbours; None if they are not."""
    return slabs[0] if slabs and slabs[-1] - slabs[0] == len(slabs) - 1 else None

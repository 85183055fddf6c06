"""The three products on a CPU: per row (or column) of blocks, one dense product of what its living blocks read.

Everything is copied in pieces, which are as long as a block is wide: c neighbouring values of a weight or of x, or r of
dy. One index_select puts all that a product reads beside one another, on all cores; blocks that are neighbours already
are read where they are. Each product then accumulates in fp32 and writes its outputs in place.

B living blocks, P = B·r pieces of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.layout import BlockLists, Grid, unpack_index
from sparsetrain_kernels.memory import new_result

_CACHE_BYTES = 1 << 20
_FEWEST_TOKENS = 256


def output(x_TK: Tensor, weight: Tensor, bias_N: Tensor | None, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """x Wᵀ + bias [T, N]; `zeroed` makes no difference, dead blocks are not read."""
    lists = unpack_index(index, grid)
    reads = _Reads(x_TK, grid.block_columns, lists.row_starts, lists.columns)
    pieces_P = _pieces(lists, grid, weight.ndim == 3)[_pieces(lists, grid, packed=False).argsort()]
    parts = _select(weight, pieces_P, grid, x_TK.dtype, reads.counts)
    matrices = [part.view(grid.block_rows, -1).T if len(part) else None for part in parts]
    biases = [None] * grid.num_rows if bias_N is None else torch.split(bias_N, grid.block_rows)
    return _products(reads, matrices, biases, grid.block_rows)


def input_gradient(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """dy W [T, K]."""
    lists = unpack_index(index, grid)
    reads = _Reads(dy_TN, grid.block_rows, lists.column_starts, lists.rows)
    pieces_P = _by_column(_pieces(lists, grid, weight.ndim == 3), lists)
    parts = _select(weight, pieces_P, grid, dy_TN.dtype, reads.counts)
    matrices = [part if len(part) else None for part in parts]
    return _products(reads, matrices, [None] * grid.num_columns, grid.block_columns)


def weight_gradient(dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: Grid, packed: bool, dtype: torch.dtype) -> Tensor:
    """The living blocks of dyᵀ x, packed or in a dense tensor of zeros.

    Column by column: the transposed product with many rows and few columns is the faster way round in bf16.
    """
    lists = unpack_index(index, grid)
    reads = _Reads(dy_TN, grid.block_rows, lists.column_starts, lists.rows)
    pieces_P = _by_column(_pieces(lists, grid, packed), lists)
    products_Pc = dy_TN.new_empty(len(pieces_P) + 1, grid.block_columns)
    products_Pc[-1] = 0  # the piece that dead blocks get
    parts = torch.split(products_Pc[:-1], [count * grid.block_rows for count in reads.counts])
    beside = _Buffer(reads, len(dy_TN))
    for column, (part, x_Tc) in enumerate(zip(parts, torch.split(x_TK, grid.block_columns, 1), strict=True)):
        if len(part):
            torch.mm(beside(column, dy_TN).T, x_Tc, out=part)
    gradient = new_result(dy_TN, *((len(lists.columns), *grid[2:]) if packed else grid.shape), dtype=dtype)
    sources = pieces_P.new_full((gradient.numel() // grid.block_columns,), len(pieces_P))
    sources[pieces_P] = torch.arange(len(pieces_P), dtype=sources.dtype)
    torch.index_select(products_Pc.to(dtype), 0, sources, out=gradient.view(-1, grid.block_columns))
    return gradient


class _Reads:
    """What each product reads of a matrix [T, X]: some of its slabs, which are `width` columns wide."""

    def __init__(self, matrix_TX: Tensor, width: int, starts: Tensor, slabs_B: Tensor) -> None:
        self.matrix_TX, self.width = matrix_TX, width
        self.counts: list[int] = starts.diff().tolist()
        self.slabs = torch.split(slabs_B, self.counts)
        self.firsts: list[int | None] = [_first_of_run(part) for part in map(Tensor.tolist, self.slabs)]

    def tokens_in_cache(self) -> int:
        """How many tokens at a time keep what a product reads in cache."""
        bytes_per_token = max(self.counts) * self.width * self.matrix_TX.itemsize
        return min(max(_FEWEST_TOKENS, _CACHE_BYTES // max(bytes_per_token, 1)), len(self.matrix_TX))


class _Buffer:
    """Memory for what any of the products reads of so many tokens: pieces are copied there side by side."""

    def __init__(self, reads: _Reads, most_tokens: int) -> None:
        self.reads = reads
        num_slabs = reads.matrix_TX.shape[1] // reads.width
        self.first_T1 = torch.arange(most_tokens, dtype=torch.int32)[:, None] * num_slabs
        self.memory = new_result(reads.matrix_TX, most_tokens * max(reads.counts), reads.width)

    def __call__(self, product: int, tokens_TX: Tensor) -> Tensor:
        """The slabs of some of the matrix's tokens that a product reads, side by side."""
        width, count, first = self.reads.width, self.reads.counts[product], self.reads.firsts[product]
        if first is not None:
            return tokens_TX[:, first * width : (first + count) * width]
        pieces_TB = self.first_T1[: len(tokens_TX)] + self.reads.slabs[product]
        gathered = self.memory[: len(tokens_TX) * count]
        torch.index_select(tokens_TX.view(-1, width), 0, pieces_TB.view(-1), out=gathered)
        return gathered.view(len(tokens_TX), count * width)


def _products(reads: _Reads, matrices: Sequence[Tensor | None], biases: Sequence[Tensor | None], width: int) -> Tensor:
    """Side by side, `width` columns each: what every product reads times its matrix, plus its bias."""
    out_TY = new_result(reads.matrix_TX, len(reads.matrix_TX), width * len(matrices))
    if not len(reads.matrix_TX):
        return out_TY
    num_tokens = reads.tokens_in_cache()
    beside = _Buffer(reads, num_tokens)
    for tokens_TX, out in zip(torch.split(reads.matrix_TX, num_tokens), torch.split(out_TY, num_tokens), strict=True):
        for product, (matrix, bias, out_Ty) in enumerate(
            zip(matrices, biases, torch.split(out, width, 1), strict=True)
        ):
            if matrix is None:
                out_Ty.copy_(out_Ty.new_zeros(()) if bias is None else bias)
            elif bias is None:
                torch.mm(beside(product, tokens_TX), matrix, out=out_Ty)
            else:
                torch.addmm(bias, beside(product, tokens_TX), matrix, out=out_Ty)
    return out_TY


def _pieces(lists: BlockLists, grid: Grid, packed: bool) -> Tensor:
    """Where the pieces of living blocks are among those of a weight [P], block by block."""
    if packed:
        return torch.arange(len(lists.columns) * grid.block_rows, dtype=torch.int32)
    rows, columns = lists.places()
    within_r = torch.arange(grid.block_rows, dtype=torch.int32)
    return ((rows[:, None] * grid.block_rows + within_r) * grid.num_columns + columns[:, None]).flatten()


def _by_column(pieces_P: Tensor, lists: BlockLists) -> Tensor:
    """Pieces in the order of blocks counted column by column."""
    return pieces_P.view(len(lists.order), -1)[lists.order].flatten() if len(lists.order) else pieces_P


def _select(weight: Tensor, pieces_P: Tensor, grid: Grid, dtype: torch.dtype, counts: list[int]) -> Sequence[Tensor]:
    """Pieces of a dense or packed weight in the dtype of the computation, product by product [blocks · r, c]."""
    living_Pc = weight.view(-1, grid.block_columns).index_select(0, pieces_P).to(dtype)
    return torch.split(living_Pc, [count * grid.block_rows for count in counts])


def _first_of_run(slabs: list[int]) -> int | None:
    """The first of slabs that are neighbours; None if they are not."""
    return slabs[0] if slabs and slabs[-1] - slabs[0] == len(slabs) - 1 else None

"""`WeightBlocks`: which blocks of a weight are alive, as lists by row and by column of blocks.

R rows of blocks, C columns of blocks, B living blocks, r x c entries of a block; N = R·r outputs, K = C·c inputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Shape of a weight in blocks."""

    num_rows: int
    num_columns: int
    block_rows: int
    block_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the whole weight: outputs, inputs."""
        return self.num_rows * self.block_rows, self.num_columns * self.block_columns


class BlockLists(NamedTuple):
    """Views of a packed index, int32; living blocks are numbered row by row."""

    row_starts: Tensor
    """[R + 1]: number of the first block of each row of blocks, and their number at the end."""
    columns: Tensor
    """[B]: column of each block."""
    column_starts: Tensor
    """[C + 1]: the same for columns of blocks, whose blocks are counted column by column."""
    rows: Tensor
    """[B]: row of each block, counted column by column."""
    order: Tensor
    """[B]: number of each block, counted column by column."""

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each block, by number, [B]."""
        rows = torch.arange(len(self.row_starts) - 1, dtype=torch.int32, device=self.columns.device)
        return rows.repeat_interleave(self.row_starts.diff(), output_size=len(self.columns)), self.columns


@dataclass(frozen=True, eq=False)
class WeightBlocks:
    """Living blocks of one weight [N, K]. Build it with `from_mask`; when masks move, build a new one.

    The weight is kept in either of two forms: dense [N, K], whose dead blocks are never read, or packed [B, r, c],
    its living blocks row by row.
    """

    grid: Grid
    index: Tensor
    """All five `BlockLists` end to end, int32 [R + C + 2 + 3 B]."""
    num_blocks: int
    """B."""

    @classmethod
    def from_mask(cls, mask_RC: Tensor, block: tuple[int, int]) -> "WeightBlocks":
        """The blocks where a bool mask [R, C] of blocks is true, each of block[0] outputs and block[1] inputs.

        Raises:
            ValueError: Not such a mask, or the block has a size below 1.
        """
        if mask_RC.dtype != torch.bool or mask_RC.ndim != 2 or 0 in mask_RC.shape:
            raise ValueError(
                f"mask is {mask_RC.dtype} {list(mask_RC.shape)}: must be bool [rows of blocks, columns of blocks]"
            )
        if len(block) != 2 or min(block) < 1:
            raise ValueError(f"block={tuple(block)}: must be two sizes of at least 1, outputs and inputs of a block")
        rows, columns = mask_RC.nonzero(as_tuple=True)
        numbers_RC = torch.zeros(mask_RC.shape, dtype=torch.int64, device=mask_RC.device)
        numbers_RC[rows, columns] = torch.arange(len(rows), device=mask_RC.device)
        columns_again, rows_again = mask_RC.T.nonzero(as_tuple=True)
        lists = (_starts(mask_RC.sum(1)), columns, _starts(mask_RC.sum(0)), rows_again)
        index = torch.cat([*lists, numbers_RC[rows_again, columns_again]]).int()
        return cls(Grid(mask_RC.shape[0], mask_RC.shape[1], *block), index, len(rows))

    @classmethod
    def from_weight(cls, weight_NK: Tensor, block: tuple[int, int]) -> "WeightBlocks":
        """The blocks of a weight that hold a non-zero.

        Raises:
            ValueError: The block does not divide the weight.
        """
        grid = _grid_of(weight_NK, block)
        return cls.from_mask((by_block(weight_NK, grid) != 0).flatten(2).any(2), block)

    def to_mask(self) -> Tensor:
        """The mask of blocks, bool [R, C]."""
        mask = torch.zeros(self.grid[:2], dtype=torch.bool, device=self.index.device)
        mask[self.lists.places()] = True
        return mask

    def pack(self, weight_NK: Tensor) -> Tensor:
        """The living blocks [B, r, c] of a dense weight; differentiable.

        Raises:
            ValueError: The weight has another shape.
        """
        self.check_weight(weight_NK, packed=False)
        return by_block(weight_NK, self.grid)[self.lists.places()]

    def unpack(self, packed_Brc: Tensor) -> Tensor:
        """The dense weight [N, K] of packed blocks, zero elsewhere; differentiable.

        Raises:
            ValueError: They have another shape.
        """
        self.check_weight(packed_Brc, packed=True)
        blocks = packed_Brc.new_zeros(self.grid.num_rows, self.grid.num_columns, *packed_Brc.shape[1:])
        return blocks.index_put(self.lists.places(), packed_Brc).transpose(1, 2).reshape(self.grid.shape)

    def repack(self, packed_Brc: Tensor, moved: "WeightBlocks") -> Tensor:
        """Packed blocks after the masks moved from this layout to another: kept ones, and zeros for new ones.

        Raises:
            ValueError: The two layouts are of different grids, or the blocks of another layout.
        """
        if moved.grid != self.grid:
            raise ValueError(
                f"moved={moved}: is of {moved.grid}, the weight of {self.grid}; masks move inside one grid"
            )
        self.check_weight(packed_Brc, packed=True)
        numbers_RC = torch.full(self.grid[:2], -1, device=self.index.device)
        numbers_RC[self.lists.places()] = torch.arange(self.num_blocks, device=self.index.device)
        before_B = numbers_RC[moved.lists.places()]
        if not self.num_blocks:
            return packed_Brc.new_zeros(moved.num_blocks, *packed_Brc.shape[1:])
        return torch.where(before_B[:, None, None] >= 0, packed_Brc[before_B.clamp(min=0)], 0)

    def to(self, device: torch.device | str) -> "WeightBlocks":
        """The same blocks on another device."""
        return WeightBlocks(self.grid, self.index.to(device), self.num_blocks)

    @property
    def density(self) -> float:
        """Share of the blocks that live."""
        return self.num_blocks / (self.grid.num_rows * self.grid.num_columns)

    @property
    def lists(self) -> BlockLists:
        """The index taken apart."""
        return unpack_index(self.index, self.grid)

    def check_weight(self, weight: Tensor, *, packed: bool) -> None:
        """Compare a weight's shape with the layout's.

        Raises:
            ValueError: They differ.
        """
        expected = (self.num_blocks, *self.grid[2:]) if packed else self.grid.shape
        if tuple(weight.shape) != expected:
            form = "packed [blocks, rows, columns]" if packed else "dense [outputs, inputs]"
            raise ValueError(f"weight is {list(weight.shape)}: the layout's, {form}, is {list(expected)}")

    def __repr__(self) -> str:
        block = f"{self.grid.block_rows}x{self.grid.block_columns}"
        return f"WeightBlocks({self.num_blocks} of {self.grid.num_rows}x{self.grid.num_columns} blocks of {block})"


def unpack_index(index: Tensor, grid: Grid) -> BlockLists:
    """Take a packed index apart."""
    starts = grid.num_rows + 1, grid.num_columns + 1
    num_blocks = (index.numel() - sum(starts)) // 3
    return BlockLists(*torch.split(index, [starts[0], num_blocks, starts[1], num_blocks, num_blocks]))


def by_block(weight_NK: Tensor, grid: Grid) -> Tensor:
    """View [R, C, r, c] of a dense weight."""
    by_place = weight_NK.view(grid.num_rows, grid.block_rows, grid.num_columns, grid.block_columns)
    return by_place.transpose(1, 2)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _grid_of(weight_NK: Tensor, block: tuple[int, int]) -> Grid:
    if weight_NK.ndim != 2 or min(block) < 1 or weight_NK.shape[0] % block[0] or weight_NK.shape[1] % block[1]:
        raise ValueError(
            f"block={tuple(block)} does not divide the weight {list(weight_NK.shape)} [outputs, inputs]; "
            "choose a block that divides both"
        )
    return Grid(weight_NK.shape[0] // block[0], weight_NK.shape[1] // block[1], *block)

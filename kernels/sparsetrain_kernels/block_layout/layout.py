"""`BlockLayout`: the blocks of keys that each block of queries sees, for each head."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout import flex, picture
from sparsetrain_kernels.block_layout.lists import BlockList
from sparsetrain_kernels.block_layout.numbers import check_integer
from sparsetrain_kernels.block_layout.patterns import Pattern
from sparsetrain_kernels.block_layout.ranges import END, FIRST, block_ranges, document_bounds, query_bounds
from sparsetrain_kernels.block_layout.visibility import Visibility

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Of each head and block of queries the visible blocks of keys, as compressed lists by row and by column.

    Build it from patterns (`build`), a mask of blocks (`from_mask`) or FlexAttention's BlockMask (`from_block_mask`).
    It says nothing of single tokens: causality and documents are arguments of the attention operator, which masks
    inside the blocks that need it.
    """

    block: int
    """Tokens of a block, of queries and keys alike."""
    rows: BlockList
    """CSR: of each block of queries its blocks of keys."""
    columns: BlockList
    """CSC: of each block of keys its blocks of queries."""
    first_query_block: int = 0
    """Place in the sequence of the first block of queries; not 0 in a slice."""
    first_key_block: int = 0
    """Place in the sequence of the first block of keys; not 0 in a slice."""
    is_slice: bool = False
    """Whether blocks of queries or keys of a longer sequence were left out, even if only behind these."""
    blind_if_causal: tuple[int, int] | None = None
    """A head and block of queries that causality would leave no key, where `build` was not told to allow that:
    attention with causal=True is refused then."""
    _ranges: tuple[Tensor, Tensor] = field(init=False, repr=False)
    """Row and column ranges of the variants of `visibility` without documents: causal + 2 · ragged."""
    _densities: tuple[float, float] = field(init=False, repr=False)
    """Share of all blocks that is listed, and of those that causality leaves."""

    def __post_init__(self) -> None:
        queries, keys = self.num_query_blocks * self.block, self.num_key_blocks * self.block
        bounds = [
            query_bounds(queries, last_key, causal=causal, shift=self.shift, device=self.device)
            for last_key in (keys, keys - 1)  # where exactly the last block of keys breaks off makes no difference
            for causal in (False, True)
        ]
        ranges = block_ranges(self.rows, self.columns, torch.cat(bounds), self.block)
        object.__setattr__(self, "_ranges", ranges)
        object.__setattr__(self, "_densities", self._count(ranges[0]))

    @classmethod
    def build(
        cls,
        patterns: Pattern | Sequence[Pattern],
        num_tokens: int,
        *,
        block: int = 64,
        causal: bool = True,
        num_heads: int | None = None,
        allow_empty: bool = False,
    ) -> "BlockLayout":
        """Lay patterns out over a sequence.

        Args:
            patterns: One for all heads, or one for each.
            num_tokens: Length of the sequence; need not be a multiple of `block`.
            block: Tokens of a block.
            causal: Keep only blocks on and below the diagonal. A layout without causality may be attended to causally
                where that leaves every block of queries a key.
            num_heads: Heads, where one pattern that differs by head is given.
            allow_empty: Accept blocks of queries that see no key; attention gives 0 there.

        Raises:
            ValueError: A block of queries sees nothing, or patterns and heads do not match.
        """
        check_integer("num_tokens", num_tokens)
        check_integer("block", block)
        masks = [
            pattern.mask(num_tokens, block, head=head, causal=causal)
            for head, pattern in enumerate(_one_per_head(patterns, num_heads))
        ]
        if all(torch.equal(mask, masks[0]) for mask in masks):
            masks = masks[:1]
        mask = torch.stack(masks)
        blind = None
        if not allow_empty and (at := (~mask.tril().any(-1)).nonzero().tolist()):
            blind = at[0][0], at[0][1]
        empty = (~mask.any(-1)).nonzero()
        if len(empty) and not allow_empty:
            head, row = empty[0].tolist()
            raise ValueError(
                f"patterns={patterns!r}: query block {row} of head {head} sees no key ({len(empty)} such blocks); "
                "add a pattern that holds the diagonal (`| Local(1)`), or pass allow_empty=True for zeros there"
            )
        return replace(cls.from_mask(mask, block), blind_if_causal=blind)

    @classmethod
    def from_mask(cls, mask: Tensor, block: int = 64) -> "BlockLayout":
        """Layout of a mask of blocks: bool [H or 1, Q, K], on the device where it will be used.

        Raises:
            ValueError: Not such a mask.
        """
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"mask is a {type(mask).__name__}: must be a bool tensor [heads or 1, query blocks, key blocks]"
            )
        if mask.dtype != torch.bool or mask.ndim != 3 or 0 in mask.shape:
            raise ValueError(
                f"mask is {mask.dtype} {list(mask.shape)}: must be bool [heads or 1, query blocks, key blocks], none 0"
            )
        check_integer("block", block)
        return cls(block, BlockList.compress(mask), BlockList.compress(mask.mT))

    @classmethod
    def from_block_mask(cls, block_mask: "BlockMask") -> "BlockLayout":
        """Layout of a FlexAttention BlockMask's blocks, full and partial; its mask_mod is not carried over.

        Raises:
            ValueError: Its blocks are not square, or differ between the samples of a batch.
        """
        mask, block = flex.block_mask_to_mask(block_mask)
        return cls.from_mask(mask, block)

    def to_mask(self) -> Tensor:
        """The mask of blocks, bool [H or 1, Q, K]."""
        return self.rows.expand()

    def to_block_mask(self, num_queries: int, num_keys: int | None = None, *, causal: bool = False) -> "BlockMask":
        """FlexAttention's BlockMask of the same blocks for sequences of given lengths, causal inside them or not.

        Raises:
            ValueError: The lengths do not match the layout.
        """
        num_keys = num_queries if num_keys is None else num_keys
        self.check_lengths(num_queries, num_keys)
        return flex.mask_to_block_mask(self.to_mask(), self.block, num_queries, num_keys, causal, self.shift)

    def __or__(self, other: "BlockLayout") -> "BlockLayout":
        """Blocks of either; a shared layout spreads over the heads of the other."""
        return self._rebuilt(self.to_mask() | self._aligned(other))

    def __and__(self, other: "BlockLayout") -> "BlockLayout":
        """Blocks of both."""
        return self._rebuilt(self.to_mask() & self._aligned(other))

    def slice_heads(self, first: int, end: int) -> "BlockLayout":
        """Heads first … end − 1; a shared layout stays as it is."""
        return (
            self if self.num_heads == 1 else self._rebuilt(self.to_mask()[_range("heads", first, end, self.num_heads)])
        )

    def slice_queries(self, first: int, end: int) -> "BlockLayout":
        """Blocks of queries first … end − 1, with the keys that they see; causality still goes by their old places."""
        part = _range("query blocks", first, end, self.num_query_blocks)
        place = self.first_query_block + first
        is_slice = self.is_slice or end - first < self.num_query_blocks
        return replace(self._rebuilt(self.to_mask()[:, part]), first_query_block=place, is_slice=is_slice)

    def slice_keys(self, first: int, end: int) -> "BlockLayout":
        """Blocks of keys first … end − 1; results over parts of the keys are combined by their log-sum-exp."""
        part = _range("key blocks", first, end, self.num_key_blocks)
        place = self.first_key_block + first
        is_slice = self.is_slice or end - first < self.num_key_blocks
        return replace(self._rebuilt(self.to_mask()[:, :, part]), first_key_block=place, is_slice=is_slice)

    def to(self, device: torch.device | str) -> "BlockLayout":
        """Copy on a device; itself where it lies there."""
        if torch.device(device) == self.device:
            return self
        return replace(self, rows=self.rows.to(device), columns=self.columns.to(device))

    @property
    def device(self) -> torch.device:
        """Where the lists lie."""
        return self.rows.indices.device

    @property
    def num_heads(self) -> int:
        """Heads with lists of their own; 1 where all share one."""
        return len(self.rows.indptr)

    @property
    def num_query_blocks(self) -> int:
        """Blocks of queries."""
        return self.rows.num_lines

    @property
    def num_key_blocks(self) -> int:
        """Blocks of keys."""
        return self.columns.num_lines

    @property
    def shift(self) -> int:
        """Position of the first query minus that of the first key, in tokens."""
        return (self.first_query_block - self.first_key_block) * self.block

    def density(self, *, causal: bool = False) -> float:
        """Share of blocks that are visible, mean over heads; with `causal`, of those on and below the diagonal."""
        return self._densities[causal]

    def plot(self, *, causal: bool = False) -> "Figure":
        """Draw a panel for each head, its visible blocks filled; with `causal`, what causality hides is left out."""
        diagonal = self.shift // self.block if causal else None
        return picture.draw(self.to_mask().cpu(), self.block, diagonal, self.first_query_block, self.first_key_block)

    def check_lengths(self, num_queries: int, num_keys: int) -> None:
        """Raise ValueError unless the layout covers these lengths with no block to spare."""
        for what, tokens, blocks in (
            ("queries", num_queries, self.num_query_blocks),
            ("keys", num_keys, self.num_key_blocks),
        ):
            if not (blocks - 1) * self.block < tokens <= blocks * self.block:
                raise ValueError(
                    f"layout has {blocks} blocks of {self.block} {what} but there are {tokens} {what}: "
                    f"build it for {tokens} tokens"
                )

    def visibility(
        self, batch: int, num_queries: int, num_keys: int, *, causal: bool, cu_seqlens: Tensor | None = None
    ) -> Visibility:
        """Full and partial blocks of each row and column at given lengths.

        Args:
            batch: Samples.
            num_queries: Queries of a sample.
            num_keys: Keys of a sample.
            causal: Whether a query sees no later key.
            cu_seqlens: Borders of documents, see `block_sparse_attention`.
        """
        if cu_seqlens is None:
            variant = causal + 2 * (num_keys < self.num_key_blocks * self.block)
            rows, columns = (ranges[variant : variant + 1] for ranges in self._ranges)
            return self._visibility(causal, rows, columns, None)
        first_query = self.first_query_block * self.block
        # A slice does not know how long the whole is: then cu_seqlens are those of one sample, and say so.
        whole = not self.is_slice and num_queries == num_keys
        documents = document_bounds(
            cu_seqlens, batch, num_queries, num_keys if whole else cu_seqlens[-1], first_query=first_query
        )
        bounds = query_bounds(
            num_queries,
            num_keys,
            causal=causal,
            shift=self.shift,
            documents=documents - self.first_key_block * self.block,
        )
        return self._visibility(causal, *block_ranges(self.rows, self.columns, bounds, self.block), bounds)

    def _visibility(self, causal: bool, rows: Tensor, columns: Tensor, bounds: Tensor | None) -> Visibility:
        lists = self.rows.indices, rows, self.columns.indices, columns
        return Visibility(self.block, causal, self.shift, *lists, self._densities[causal], bounds)

    def _count(self, row_ranges: Tensor) -> tuple[float, float]:
        """Densities with and without causality, counted once: asking a GPU at every call would make it wait."""
        if row_ranges.is_meta:
            return 1.0, 1.0  # there are no lists to count
        queries, keys = self.num_query_blocks, self.num_key_blocks
        below = self.shift // self.block
        triangle = sum(min(max(row + below + 1, 0), keys) for row in range(queries))
        listed = (row_ranges[:2, ..., END] - row_ranges[:2, ..., FIRST]).sum((1, 2)).tolist()
        every = self.num_heads * queries * keys, self.num_heads * triangle
        return listed[0] / every[0], listed[1] / every[1] if every[1] else 0.0

    def _aligned(self, other: "BlockLayout") -> Tensor:
        """The other's mask, if it lies over the same blocks."""
        if not isinstance(other, BlockLayout):
            raise ValueError(
                f"a layout and a {type(other).__name__} do not combine: lay that out with BlockLayout.build first"
            )
        mine, its = self._place, other._place
        if mine != its or (self.num_heads != other.num_heads and 1 not in (self.num_heads, other.num_heads)):
            raise ValueError(
                f"layouts differ in (block, query blocks, key blocks, first query block, first key block) or heads: "
                f"{mine} with {self.num_heads} heads and {its} with {other.num_heads}; build both for the same sequence"
            )
        return other.to_mask()

    @property
    def _place(self) -> tuple[int, ...]:
        blocks = (self.num_query_blocks, self.num_key_blocks)
        return (self.block, *blocks, self.first_query_block, self.first_key_block)

    def _rebuilt(self, mask: Tensor) -> "BlockLayout":
        """Layout of another mask in the same place."""
        lists = BlockList.compress(mask), BlockList.compress(mask.mT)
        return replace(self, rows=lists[0], columns=lists[1], blind_if_causal=None)

    def __repr__(self) -> str:
        heads = "shared by all heads" if self.num_heads == 1 else f"{self.num_heads} heads"
        return (
            f"BlockLayout({self.num_query_blocks} x {self.num_key_blocks} blocks of {self.block}, {heads}, "
            f"density {self.density():.3g})"
        )


def _one_per_head(patterns: Pattern | Sequence[Pattern], num_heads: int | None) -> list[Pattern]:
    if num_heads is not None:
        check_integer("num_heads", num_heads)
    if isinstance(patterns, Pattern):
        if num_heads is None and patterns.differs_by_head:
            raise ValueError(f"patterns={patterns!r} differs by head: pass num_heads")
        return [patterns] * (1 if num_heads is None or not patterns.differs_by_head else num_heads)
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, Pattern) for pattern in patterns):
        raise ValueError(
            f"patterns={patterns!r}: must be a Pattern such as Local(4) | Sink(1), or a list of one a head"
        )
    if not patterns or (num_heads is not None and len(patterns) != num_heads):
        raise ValueError(
            f"patterns has {len(patterns)} entries for num_heads={num_heads}: give one for each head, or one"
        )
    return list(patterns)


def _range(what: str, first: int, end: int, size: int) -> slice:
    for name, value in (("first", first), ("end", end)):
        check_integer(f"{name} of {what}", value, least=0)
    if not 0 <= first < end <= size:
        raise ValueError(f"{what} {first} to {end} of {size}: must be 0 ≤ first < end ≤ {size}")
    return slice(first, end)

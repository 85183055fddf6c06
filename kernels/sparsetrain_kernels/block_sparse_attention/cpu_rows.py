"""Rows of blocks on a CPU: which are computed together, the blocks they gather, and what is hidden in these.

Shapes: B samples, S queries, H query heads, D head dim; R rows in one product, M queries of a row (of all its heads),
N visible blocks of a row, P = N · block keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain_kernels.block_layout.ranges import END, FIRST, FULL, NOT_FULL, query_bounds
from sparsetrain_kernels.block_layout.visibility import Visibility
from sparsetrain_kernels.memory import new_result

_BYTES_AT_ONCE = 2**20
"""Bytes of the scores of rows computed together; the backward pass has eight such buffers, which caches then hold."""


class Scratch:
    """Buffers by name, used over and over: fresh ones would be mapped into memory page by page, out of every cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of a shape, with whatever the last one of that name left there."""
        numel = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < numel:
            self._buffers[name] = torch.empty(numel, dtype=dtype or self._dtype)
        return self._buffers[name][:numel].view(shape)

    def cast(self, name: str, x: Tensor) -> Tensor:
        """A copy in the dtype of the buffers; x itself where it has that."""
        return x if x.dtype == self._dtype else self(name, *x.shape).copy_(x)


@dataclass(frozen=True)
class Rows:
    """Rows that see equally many blocks, computed together."""

    slice: slice
    """Their places among all rows, in the order of `AllRows`."""
    gathered: Tensor
    """int64 [R · N], blocks among all those of keys."""
    first_keys: Tensor
    """int32 [R, N], the first key of each block in its sample."""
    bounds: Tensor
    """int32 [R, block, 2], first key of each query and one past its last."""
    partial: tuple[int, ...]
    """Which of the N blocks hide something in some of the rows; empty: every query sees every key."""

    def gather(self, blocks: Tensor, into: Tensor) -> Tensor:
        """[R, P, D] of all blocks [., block, D]; `into` is [R · N, block, D]."""
        return torch.index_select(blocks, 0, self.gathered, out=into).view(len(self.bounds), -1, blocks.shape[2])

    def add_to(self, blocks: Tensor, values_RPD: Tensor, scratch: Scratch) -> None:
        """Add to the gathered ones among all blocks what belongs to them, in order."""
        values = values_RPD.view(-1, *blocks.shape[1:])
        if values.dtype != blocks.dtype:
            values = scratch("cast", *values.shape, dtype=blocks.dtype).copy_(values)
        blocks.index_add_(0, self.gathered, values)

    def hide(self, scores: Tensor) -> None:
        """Set scores [R, M, P] of keys that a query does not see to −∞, in place."""
        block = self.bounds.shape[1]
        by_block = scores.view(len(scores), -1, block, scores.shape[2] // block, block)
        key = torch.arange(block, dtype=torch.int32)
        for n in self.partial:
            bounds = self.bounds - self.first_keys[:, n, None, None]
            if (bounds == bounds[:1]).all():  # the causal diagonal: one mask for all rows
                bounds = bounds[:1]
            hidden = key >= bounds[..., 1:]
            if (bounds[..., 0] > 0).any():
                hidden |= key < bounds[..., :1]
            by_block[:, :, :, n].masked_fill_(hidden.unsqueeze(1), float("-inf"))


class AllRows:
    """The rows of a call, one for each sample, head and block of queries, by ascending number of visible blocks.

    Args:
        q_BSHD: Queries.
        k_BTKD: Keys.
        visible: What they see.
        score_bytes: Bytes of a score, which limit how many rows are computed together.

    Attributes:
        heads: Heads that have rows of their own: all, or where the layout is shared those of keys and values.
    """

    def __init__(self, q_BSHD: Tensor, k_BTKD: Tensor, visible: Visibility, *, score_bytes: int) -> None:
        batch, num_queries, num_heads, _ = q_BSHD.shape
        _, num_keys, num_kv_heads, _ = k_BTKD.shape
        num_lists, list_len = visible.key_blocks.shape
        num_blocks, num_key_blocks = visible.row_ranges.shape[2], visible.column_ranges.shape[2]
        self.heads = num_kv_heads if num_lists == 1 else num_heads
        self._block = visible.block
        self._bytes_a_block = num_heads // self.heads * visible.block**2 * score_bytes
        ranges = visible.row_ranges.expand(batch, self.heads, -1, -1).reshape(-1, 4)
        self._counts, self._order = (ranges[:, END] - ranges[:, FIRST]).sort(stable=True)
        self._inverse = self._order.argsort()
        self._ranges = ranges[self._order]
        sample = self._order // (self.heads * num_blocks)
        head, row = self._order // num_blocks % self.heads, self._order % num_blocks
        self._key_blocks = visible.key_blocks.view(-1)
        self._list = self._ranges[:, FIRST] + (head * list_len if num_lists > 1 else 0)
        self._first_block = (sample * num_kv_heads + head // (self.heads // num_kv_heads)) * num_key_blocks
        bounds = visible.bounds
        if bounds is None:
            bounds = query_bounds(num_queries, num_keys, causal=visible.causal, shift=visible.shift)
        token = torch.arange(num_blocks * visible.block).clamp_(max=num_queries - 1)  # past the end as the last query
        self._bounds = bounds[:, token].view(-1, visible.block, 2)
        self._bounds_row = row + (sample * num_blocks if len(bounds) > 1 else 0)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Rows]:
        """All rows that see any block; those together that see equally many, as many as fit the caches."""
        different, sizes = torch.unique_consecutive(self._counts, return_counts=True)
        end = 0
        for count, size in zip(different.tolist(), sizes.tolist(), strict=True):
            first, end = end, end + size
            if count > 0:
                yield from self._rows(first, end, count)

    def _rows(self, first: int, end: int, count: int) -> Iterator[Rows]:
        """Rows first … end − 1, which all see `count` blocks."""
        ranges = self._ranges[first:end]
        before = int((ranges[:, FULL] - ranges[:, FIRST]).max())
        after = int((ranges[:, END] - ranges[:, NOT_FULL]).max())
        partial = tuple(n for n in range(count) if n < before or n >= count - after)
        key_blocks = self._key_blocks[self._list[first:end, None] + torch.arange(count)]
        gathered = self._first_block[first:end, None] + key_blocks
        first_keys = key_blocks * self._block
        bounds = self._bounds[self._bounds_row[first:end]]
        step = max(1, _BYTES_AT_ONCE // (count * self._bytes_a_block))
        for at in range(0, end - first, step):
            part = slice(at, min(at + step, end - first))
            places = slice(first + part.start, first + part.stop)
            yield Rows(places, gathered[part].view(-1), first_keys[part], bounds[part], partial)

    def sort(self, x_BSHD: Tensor, fill: float = 0.0) -> Tensor:
        """Of [B, S, H, D], which are queries or belong to them, the rows [., M, D]; `fill` past the end."""
        return _take(to_blocks(x_BSHD, self.heads, self._block, fill), self._order)

    def unsort(self, rows: Tensor, like_BSHD: Tensor) -> Tensor:
        """The inverse of `sort`: contiguous, of the size of another."""
        return from_blocks(_take(rows, self._inverse), like_BSHD, self.heads)


def to_blocks(x_BSHD: Tensor, heads: int, block: int, fill: float = 0.0) -> Tensor:
    """[B · heads · blocks, H/heads · block, D], contiguous; the last block is filled up."""
    batch, num_tokens, num_heads, dim = x_BSHD.shape
    missing = -num_tokens % block
    if missing:
        x_BSHD = F.pad(x_BSHD, (0, 0, 0, 0, 0, missing), value=fill)
    group = num_heads // heads
    parts = x_BSHD.reshape(batch, -1, block, heads, group, dim).permute(0, 3, 1, 4, 2, 5)
    return new_result(x_BSHD, *parts.shape).copy_(parts).view(-1, group * block, dim)


def from_blocks(blocks: Tensor, like_BSHD: Tensor, heads: int) -> Tensor:
    """The inverse of `to_blocks`: [B, S, H, D], contiguous, of the size of another."""
    batch, num_tokens, num_heads, dim = like_BSHD.shape
    group = num_heads // heads
    parts = blocks.view(batch, heads, -1, group, blocks.shape[1] // group, dim).permute(0, 2, 4, 1, 3, 5)
    whole = new_result(blocks, *parts.shape).copy_(parts)
    return whole.view(batch, -1, num_heads, dim)[:, :num_tokens].contiguous()


def _take(rows: Tensor, order: Tensor) -> Tensor:
    return torch.index_select(rows, 0, order, out=new_result(rows, *rows.shape))

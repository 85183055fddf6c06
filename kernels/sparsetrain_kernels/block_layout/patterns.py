"""The vocabulary of attention patterns, in blocks; `|` and `&` combine them.

Every pattern says which key blocks j a query block i sees. Widths, strides and counts are numbers of blocks: finer
borders (the causal diagonal, the ends of documents) are the attention operator's business.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout.numbers import check_integer


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of all patterns."""

    @property
    def differs_by_head(self) -> bool:
        """Whether two heads with this pattern see different blocks."""
        return False

    def mask(self, num_tokens: int, block: int, *, head: int, causal: bool) -> Tensor:
        """Bool [n, n], n = ⌈num_tokens / block⌉; True at [i, j] where query block i sees key block j.

        With `causal`, nothing above the diagonal is True.
        """
        n = num_blocks(num_tokens, block)
        seen = self._seen(n, num_tokens, block, head, causal)
        return seen.tril() if causal else seen

    @abstractmethod
    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        """As `mask`, for n blocks; what is above the diagonal may be anything."""

    def __or__(self, other: "Pattern") -> "Pattern":
        return _Combined(self, _pattern(other, "|"), "|", torch.logical_or)

    def __and__(self, other: "Pattern") -> "Pattern":
        return _Combined(self, _pattern(other, "&"), "&", torch.logical_and)


@dataclass(frozen=True)
class Dense(Pattern):
    """Every block."""

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        return torch.ones(n, n, dtype=torch.bool)


@dataclass(frozen=True)
class Local(Pattern):
    """The `width` nearest blocks, the query's own included; without causality also as many after it."""

    width: int

    def __post_init__(self) -> None:
        check_integer("Local.width", self.width)

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        return _distances(n).abs() < self.width


@dataclass(frozen=True)
class Sink(Pattern):
    """The first `width` blocks of the sequence (StreamingLLM, arXiv 2309.17453)."""

    width: int

    def __post_init__(self) -> None:
        check_integer("Sink.width", self.width)

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        return (torch.arange(n) < self.width).expand(n, n).clone()


@dataclass(frozen=True)
class Strided(Pattern):
    """Every `stride`-th key block, j ≡ offset mod stride (S2-Attention, arXiv 2407.17678).

    Without an offset head h takes offset h: heads share out the context, and any `stride` heads in a row cover it.
    """

    stride: int
    offset: int | None = None

    def __post_init__(self) -> None:
        check_integer("Strided.stride", self.stride)
        if self.offset is not None:
            check_integer("Strided.offset", self.offset, least=0)

    @property
    def differs_by_head(self) -> bool:
        """True unless the offset is fixed."""
        return self.offset is None and self.stride > 1

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        offset = head if self.offset is None else self.offset
        return (torch.arange(n) % self.stride == offset % self.stride).expand(n, n).clone()


@dataclass(frozen=True)
class Dilated(Pattern):
    """A window with gaps: distances 0, d, 2d, … (width − 1)·d for a dilation of d (Longformer, arXiv 2004.05150)."""

    width: int
    dilation: int

    def __post_init__(self) -> None:
        check_integer("Dilated.width", self.width)
        check_integer("Dilated.dilation", self.dilation)

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        distance = _distances(n).abs()
        return (distance % self.dilation == 0) & (distance < self.width * self.dilation)


@dataclass(frozen=True)
class Random(Pattern):
    """`count` key blocks drawn for each query block and head, without replacement (BigBird, arXiv 2007.14062).

    With causality they are drawn among those at or before the query; where there are fewer, it sees them all. A draw
    depends on the seed, the head and the two blocks alone, so with causality a longer sequence keeps the same draws.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("Random.count", self.count)
        check_integer("Random.seed", self.seed, least=0)
        if self.seed >= 2**63:
            raise ValueError(f"Random.seed={self.seed}: must be below 2^63")

    @property
    def differs_by_head(self) -> bool:
        """Always."""
        return True

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        ticket = _scrambled(_scrambled(_scrambled(torch.tensor(self.seed)) + head) + (i << 32) + j)
        if causal:
            ticket.masked_fill_(j > i, torch.iinfo(torch.int64).max)
        drawn = ticket.topk(min(self.count, n), largest=False).indices
        return torch.zeros(n, n, dtype=torch.bool).scatter_(1, drawn, True)


@dataclass(frozen=True)
class Document(Pattern):
    """Blocks that share a document; `cu_seqlens` are the documents' first tokens, and the end of the last (0, …, S).

    Where a block holds the border of two documents, give the operator the same `cu_seqlens`: it masks tokens.
    """

    cu_seqlens: tuple[int, ...]

    def __post_init__(self) -> None:
        borders = self.cu_seqlens
        if not isinstance(borders, tuple | list):
            raise ValueError(
                f"Document.cu_seqlens is a {type(borders).__name__}: must be a tuple of integers; "
                "tuple(cu_seqlens.tolist()) makes one of a tensor"
            )
        for place, border in enumerate(borders):
            check_integer(f"Document.cu_seqlens[{place}]", border, least=0)
        if len(borders) < 2 or borders[0] != 0 or list(borders) != sorted(borders):
            raise ValueError(f"Document.cu_seqlens={borders}: must start with 0 and ascend, e.g. (0, 300, 1024)")

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        if self.cu_seqlens[-1] != num_tokens:
            raise ValueError(
                f"Document.cu_seqlens ends at {self.cu_seqlens[-1]} but the sequence has {num_tokens} tokens: "
                "the last entry must be the number of tokens"
            )
        ends = torch.tensor(self.cu_seqlens[1:])
        first = torch.arange(n) * block
        last = (first + block).clamp_(max=num_tokens) - 1
        first_document, last_document = (torch.searchsorted(ends, at, right=True) for at in (first, last))
        return (first_document[:, None] <= last_document) & (first_document <= last_document[:, None])


@dataclass(frozen=True, eq=False)
class Explicit(Pattern):
    """What a mask says: bool [n, n], or [H, n, n] of which head h takes row h."""

    blocks: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Tensor):
            raise ValueError(f"Explicit.blocks is a {type(self.blocks).__name__}: must be a bool tensor")
        if self.blocks.dtype != torch.bool or self.blocks.ndim not in (2, 3):
            raise ValueError(
                f"Explicit.blocks is {self.blocks.dtype} {list(self.blocks.shape)}: must be bool [n, n] or [H, n, n]"
            )

    @property
    def differs_by_head(self) -> bool:
        """True with more than one head."""
        return self.blocks.ndim == 3 and len(self.blocks) > 1

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        if self.blocks.shape[-2:] != (n, n):
            raise ValueError(
                f"Explicit.blocks is {list(self.blocks.shape)} but {num_tokens} tokens are {n} blocks of {block}: "
                f"must be [{n}, {n}] or [H, {n}, {n}]"
            )
        if self.blocks.ndim == 2 or len(self.blocks) == 1:
            return self.blocks.reshape(n, n).cpu()
        if head >= len(self.blocks):
            raise ValueError(f"Explicit.blocks has {len(self.blocks)} heads: there is no head {head}")
        return self.blocks[head].cpu()


@dataclass(frozen=True)
class _Combined(Pattern):
    left: Pattern
    right: Pattern
    symbol: str
    combine: Callable[[Tensor, Tensor], Tensor]

    @property
    def differs_by_head(self) -> bool:
        return self.left.differs_by_head or self.right.differs_by_head

    def _seen(self, n: int, num_tokens: int, block: int, head: int, causal: bool) -> Tensor:
        sides = (side._seen(n, num_tokens, block, head, causal) for side in (self.left, self.right))
        return self.combine(*sides)

    def __repr__(self) -> str:
        return f"({self.left!r} {self.symbol} {self.right!r})"


PATTERNS: dict[str, type[Pattern]] = {
    "dense": Dense,
    "local": Local,
    "sink": Sink,
    "strided": Strided,
    "dilated": Dilated,
    "random": Random,
    "document": Document,
    "explicit": Explicit,
}
"""Patterns by the names that they have in configurations."""


def _pattern(other: object, symbol: str) -> Pattern:
    """The right side of `|` or `&`."""
    if not isinstance(other, Pattern):
        raise ValueError(f"pattern {symbol} {other!r}: the right side must be a pattern too, such as Local(4)")
    return other


def num_blocks(num_tokens: int, block: int) -> int:
    """Blocks that hold a sequence; the last may be partly empty."""
    return -(-num_tokens // block)


def _distances(n: int) -> Tensor:
    """Query block minus key block, [n, n]."""
    return torch.arange(n)[:, None] - torch.arange(n)[None, :]


def _scrambled(x: Tensor) -> Tensor:
    """A hash of 64-bit integers onto the non-negative ones (the finalizer of SplitMix64, but for its sign bit)."""
    x = x + 0x1E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return (x ^ _shifted(x, 31)) & 0x7FFFFFFFFFFFFFFF


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: `>>` would carry the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

"""What a kernel reads of a layout."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Visibility:
    """The visible blocks of a call, and what is hidden inside them.

    Shapes: B samples, or 1 where all see the same; H heads, or 1; Q and K blocks of queries and keys; N blocks listed.
    """

    block: int
    """Tokens of a block."""
    causal: bool
    """Whether query t sees no key after position t + shift."""
    shift: int
    """Position of the first query minus that of the first key, in tokens."""
    key_blocks: Tensor
    """int32 [H, N]: the key blocks of the rows."""
    row_ranges: Tensor
    """int32 [B, H, Q, 4]: where in `key_blocks` each row's FIRST, FULL, NOT_FULL, END lie; see `ranges.py`."""
    query_blocks: Tensor
    """int32 [H, N]: the query blocks of the columns."""
    column_ranges: Tensor
    """int32 [B, H, K, 4]: the same positions of each column in `query_blocks`."""
    density: float
    """Share of the blocks that causality leaves which are listed; documents may hide some of these."""
    bounds: Tensor | None
    """First key of each query and one past its last, int32 [B, S, 2]; None where `causal` says it all."""

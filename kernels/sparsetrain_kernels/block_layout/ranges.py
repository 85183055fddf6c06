"""Full and partial blocks, as ranges of a compressed list.

Whatever hides single tokens (causality, the borders of documents, the end of the keys) leaves each query an interval
of keys, and both ends of it only grow with the query. So the blocks of a row that some of its queries see follow each
other in its ascending list: first partial ones, then full ones (all queries see all keys), then partial ones. Four
positions say it all, and a kernel evaluates a mask in the first and last part alone. Columns likewise.

Shapes: V variants (samples of a batch, or kinds of masking), H heads of a layout, S queries, Q and K blocks of queries
and keys.
"""

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout.lists import BlockList

FIRST, FULL, NOT_FULL, END = range(4)
"""Entries FIRST … END − 1 are visible; of these, FULL … NOT_FULL − 1 need no mask."""


def query_bounds(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    shift: int = 0,
    documents: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """First key that each query sees, and one past the last: int32 [V, S, 2], both ascending in the query.

    Args:
        num_queries: S.
        num_keys: Keys of the call.
        causal: Hide later keys.
        shift: Position of the first query minus that of the first key.
        documents: First token of each query's document and one past its last, [V, S, 2], counted from the first key.
        device: Where to make it when there are no documents.
    """
    if documents is None:
        position = torch.arange(num_queries, device=device)
        bounds = torch.stack((torch.zeros_like(position), torch.full_like(position, num_keys)), -1)[None]
    else:
        position = torch.arange(num_queries, device=documents.device)
        bounds = documents
    if causal:
        after = torch.minimum(bounds[..., 1], position + shift + 1)
        bounds = torch.stack((bounds[..., 0], after), -1)
    return bounds.clamp(0, num_keys).int()


def document_bounds(
    cu_seqlens: Tensor, batch: int, num_queries: int, num_tokens: int | Tensor, *, first_query: int
) -> Tensor:
    """First token of each query's document and one past its last, int64 [V, S, 2].

    Args:
        cu_seqlens: Integers [documents + 1], ascending from 0 to the number of tokens of one sample, whose documents
            are then those of every sample, or to that of all samples one after the other.
        batch: Samples.
        num_queries: S.
        num_tokens: Tokens of one sample.
        first_query: Position of the first query in its sample.
    """
    borders = cu_seqlens.long()
    first_of_sample = torch.arange(batch, device=borders.device)[:, None] * num_tokens % borders[-1].clamp(min=1)
    position = torch.arange(first_query, first_query + num_queries, device=borders.device)
    document = torch.searchsorted(borders, first_of_sample + position, right=True) - 1
    document = document.clamp(0, len(borders) - 2)
    start, end = borders[document] - first_of_sample, borders[document + 1] - first_of_sample
    return torch.stack((start.clamp(min=0), end.clamp(max=num_tokens)), -1)


def block_ranges(rows: BlockList, columns: BlockList, bounds: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The four positions of every row and of every column.

    Args:
        rows: Of each block of queries its blocks of keys.
        columns: Of each block of keys its blocks of queries.
        bounds: Of each query its keys, [V, S, 2], S at most the queries that `rows` holds.
        block: Tokens of a block.

    Returns:
        int32 [V, H, Q, 4], positions in `rows.indices`, and int32 [V, H, K, 4], positions in `columns.indices`.
    """
    first = torch.arange(rows.num_lines, device=bounds.device) * block
    last = (first + block).clamp(max=bounds.shape[1]) - 1
    (start_of_first, end_of_first), (start_of_last, end_of_last) = (bounds[:, t].unbind(-1) for t in (first, last))
    some_from, some_to = start_of_first // block, _ceil(end_of_last, block)
    all_from, all_to = _ceil(start_of_last, block), end_of_first // block
    row_ranges = rows.positions(_nested(some_from, all_from, all_to, some_to))

    # Query block i sees key block j somewhere when some_from[i] ≤ j < some_to[i]: as both ascend in i, that is an
    # interval of i too, whose ends are found by counting.
    key_blocks = torch.arange(columns.num_lines, device=bounds.device).expand(len(bounds), -1).contiguous()
    counts = (_count(values, key_blocks) for values in (some_to, all_to, all_from, some_from))
    return row_ranges, columns.positions(_nested(*counts))


def _nested(first: Tensor, full: Tensor, not_full: Tensor, end: Tensor) -> Tensor:
    """Stack [V, L] four times to [V, L, 4], made ascending: where nothing is visible or full, ranges are empty."""
    end = torch.maximum(end, first)
    full = torch.minimum(torch.maximum(full, first), end)
    not_full = torch.minimum(torch.maximum(not_full, full), end)
    return torch.stack((first, full, not_full, end), -1).long()


def _count(ascending: Tensor, limits: Tensor) -> Tensor:
    """How many of [V, Q] are at most each limit [V, K]."""
    return torch.searchsorted(ascending.contiguous(), limits.to(ascending.dtype), right=True)


def _ceil(x: Tensor, block: int) -> Tensor:
    return (x + block - 1) // block

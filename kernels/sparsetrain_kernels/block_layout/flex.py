"""Masks of blocks to and from FlexAttention's BlockMask; torch's module is imported when asked for, it is slow to."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def block_mask_to_mask(block_mask: "BlockMask") -> tuple[Tensor, int]:
    """Bool [H or 1, Q, K] of its full and partial blocks, and the tokens of a block.

    Raises:
        ValueError: No BlockMask, blocks that are not square, or that differ between samples.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise ValueError(
            f"block_mask is a {type(block_mask).__name__}: must be FlexAttention's BlockMask; "
            "BlockLayout.from_mask takes a mask of blocks"
        )
    block, key_block = block_mask.BLOCK_SIZE
    if block != key_block:
        raise ValueError(f"block_mask.BLOCK_SIZE is {block_mask.BLOCK_SIZE}: must be square, rebuild it with one size")
    mask = block_mask.to_dense().bool()
    if not (mask == mask[:1]).all():
        raise ValueError(
            "block_mask differs between samples: give documents as cu_seqlens, or make one layout a sample"
        )
    return mask[0], block


def mask_to_block_mask(
    mask: Tensor, block: int, num_queries: int, num_keys: int, causal: bool, shift: int
) -> "BlockMask":
    """BlockMask [1, H or 1, Q, K]; with `causal`, later blocks go and the diagonal is partial.

    Args:
        mask: Bool [H or 1, Q, K].
        block: Tokens of a block.
        num_queries: Queries of a sample.
        num_keys: Keys of a sample.
        causal: Hide later keys.
        shift: Position of the first query minus that of the first key, a multiple of `block`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    partial = torch.zeros_like(mask)
    if causal:
        diagonal = shift // block
        mask = mask.tril(diagonal)
        partial = mask & mask.new_ones(mask.shape[1:]).triu_(diagonal)

    def not_later(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + shift >= key

    return BlockMask.from_kv_blocks(
        *_counts_and_indices(partial),
        *_counts_and_indices(mask & ~partial),
        BLOCK_SIZE=block,
        mask_mod=not_later if causal else None,
        seq_lengths=(num_queries, num_keys),
    )


def _counts_and_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of each row, int32 [1, H, Q], and their columns first, int32 [1, H, Q, K]."""
    columns_first = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32)[None], columns_first.int()[None]

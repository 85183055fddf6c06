"""Softmax attention over the blocks that a `BlockLayout` lists, forward and backward."""

from sparsetrain_kernels.block_sparse_attention.op import block_sparse_attention

__all__ = ["block_sparse_attention"]

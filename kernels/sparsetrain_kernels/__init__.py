"""Kernels for sparse training that are imported for their own sake: torch and triton only."""

from sparsetrain_kernels.block_layout import BlockLayout
from sparsetrain_kernels.block_sparse_attention import block_sparse_attention
from sparsetrain_kernels.block_sparse_linear import WeightBlocks, block_sparse_linear
from sparsetrain_kernels.expert_ffn import expert_ffn, expert_ffn_backward, expert_ffn_forward, moe_ffn
from sparsetrain_kernels.grouped_mm import grouped_mm
from sparsetrain_kernels.nm_linear import NMLinear, NMPattern, NMSelection, nm_linear
from sparsetrain_kernels.permute import permute, sort_by_expert, unpermute
from sparsetrain_kernels.router_top_k import router_top_k

__all__ = [
    "BlockLayout",
    "NMLinear",
    "NMPattern",
    "NMSelection",
    "WeightBlocks",
    "block_sparse_attention",
    "block_sparse_linear",
    "expert_ffn",
    "expert_ffn_backward",
    "expert_ffn_forward",
    "grouped_mm",
    "moe_ffn",
    "nm_linear",
    "permute",
    "router_top_k",
    "sort_by_expert",
    "unpermute",
]

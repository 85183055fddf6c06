"""Kernels for sparse training that are imported for their own sake: torch and triton only, and Triton only on a GPU.

    import torch
    import sparsetrain_kernels as sk
    from sparsetrain_kernels.block_layout import Local, Sink

    layout = sk.BlockLayout.build(Local(4) | Sink(1), num_tokens=2048, block=64)
    q, k, v = (torch.randn(1, 2048, 8, 64, requires_grad=True) for _ in range(3))
    sk.block_sparse_attention(q, k, v, layout, causal=True).sum().backward()

Every operation works eagerly, under autograd and in `torch.compile(fullgraph=True)`, gives equal bits for equal inputs,
and raises ValueError with what would do where its arguments do not match:

    block_sparse_attention          softmax attention over the blocks of a `BlockLayout`
    block_sparse_linear             x Wᵀ over the living blocks of a weight, `WeightBlocks`
    nm_linear, NMLinear             x Wᵀ with N of M weights, `NMPattern` and `NMSelection`
    moe_ffn, expert_ffn             feed-forward networks of experts on rows sorted by expert
    permute, unpermute              rows to their experts and back; `sort_by_expert`, `router_top_k` prepare them
    grouped_mm                      products of the experts' rows and matrices

Which implementation runs a sparse product is chosen from times measured on the hardware, dense among the candidates:
`print(*sparsetrain_kernels.dispatch.choices(), sep="\n")` after some calls says which ones, why, and both times.
"""

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

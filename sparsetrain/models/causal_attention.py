"""Causal softmax attention: torch's operator, or on CPUs at short lengths our own, which is faster there.

Shapes: B batch, T tokens, H query heads, K key/value heads, G = H/K query heads that share one, D head dim; N = B·K.
"""

from collections.abc import Iterator
from typing import Any

import torch
from sparsetrain_kernels.precision import as_written
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# torch's CPU kernel reaches a third of the matmul peak in bf16; ours more, for T²/2 kept probabilities a head.
_LONGEST_ON_CPU = 1024
_QUERIES_PER_BLOCK = 64


def causal_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v, each query seeing keys at or before its own position.

    Args:
        q_BTHD: Queries.
        k_BTKD: Keys; K divides H, and query heads h·G .. h·G + G − 1 read key/value head h.
        v_BTKD: Values.
        document_ids_BT: With it, a query sees only keys of its own document. Integers; equal means same document.

    Returns:
        [B, T, H, D] in the dtype of the inputs.
    """
    if q_BTHD.is_cpu and q_BTHD.shape[1] <= _LONGEST_ON_CPU:
        y: Tensor = _CpuAttention.apply(q_BTHD, k_BTKD, v_BTKD, document_ids_BT)  # type: ignore[no-untyped-call]
        return y
    return F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BTKD.transpose(1, 2),
        v_BTKD.transpose(1, 2),
        attn_mask=None if document_ids_BT is None else _visible(document_ids_BT),
        is_causal=document_ids_BT is None,
        enable_gqa=q_BTHD.shape[2] != k_BTKD.shape[2],
    ).transpose(1, 2)


def _visible(document_ids_BT: Tensor) -> Tensor:
    """True [B, 1, T, T] where a query (rows) sees a key (columns)."""
    same = document_ids_BT.unsqueeze(2) == document_ids_BT.unsqueeze(1)
    return same.tril_().unsqueeze(1)


class _CpuAttention(torch.autograd.Function):
    """Blocks of queries against all the keys that they may see, as batched matrix products.

    A block's scores have the dtype of the inputs; softmax is computed in float32 or better.
    """

    @staticmethod
    def forward(ctx: Any, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        num_kv_heads, scale = k_BTKD.shape[2], q_BTHD.shape[3] ** -0.5
        k, v = _by_head(k_BTKD, num_kv_heads), _by_head(v_BTKD, num_kv_heads)
        out_BTHD = torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)
        kept = []
        with as_written(q_BTHD.device):
            for first, end in _blocks(q_BTHD.shape[1]):
                q = _by_head(q_BTHD[:, first:end], num_kv_heads)
                scores = _product(q, k[:, :end].mT, scale)
                _hide(scores, first, end, document_ids_BT)
                p = torch.softmax(scores, dim=-1)
                _write(out_BTHD[:, first:end], torch.bmm(p, v[:, :end]), num_kv_heads)
                kept += [q, p]
        ctx.save_for_backward(k, v, *kept)
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        k, v, *kept = ctx.saved_tensors
        batch, num_tokens, _, head_dim = dout_BTHD.shape
        num_kv_heads, scale = k.shape[0] // batch, head_dim**-0.5
        dq_BTHD = torch.empty_like(dout_BTHD, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for (first, end), q, p in zip(_blocks(num_tokens), kept[::2], kept[1::2], strict=True):
            dout = _by_head(dout_BTHD[:, first:end], num_kv_heads)
            dv[:, :end] += torch.bmm(p.mT, dout)
            dp = torch.bmm(dout, v[:, :end].mT)
            dscores = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            _write(dq_BTHD[:, first:end], _product(dscores, k[:, :end], scale), num_kv_heads)
            dk[:, :end] += _product(dscores.mT, q, scale)
        dk_BTKD, dv_BTKD = (d.view(batch, num_kv_heads, num_tokens, head_dim).transpose(1, 2) for d in (dk, dv))
        return dq_BTHD, dk_BTKD, dv_BTKD, None


def _blocks(num_tokens: int) -> Iterator[tuple[int, int]]:
    """First query of each block, and one past its last."""
    for first in range(0, num_tokens, _QUERIES_PER_BLOCK):
        yield first, min(first + _QUERIES_PER_BLOCK, num_tokens)


def _head_view(x_BTHD: Tensor, num_kv_heads: int) -> Tensor:
    """[B, K, T, G, D], sharing memory."""
    batch, num_tokens, _, head_dim = x_BTHD.shape
    return x_BTHD.view(batch, num_tokens, num_kv_heads, -1, head_dim).transpose(1, 2)


def _by_head(x_BTHD: Tensor, num_kv_heads: int) -> Tensor:
    """[N, T·G, D], contiguous: heads that share keys and values become rows of one matrix."""
    return _head_view(x_BTHD, num_kv_heads).flatten(2, 3).flatten(0, 1).contiguous()


def _write(x_BTHD: Tensor, values: Tensor, num_kv_heads: int) -> None:
    """Store [N, T·G, D] as [B, T, H, D]."""
    view = _head_view(x_BTHD, num_kv_heads)
    view.copy_(values.view(view.shape))


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b, with the scale applied inside the matrix product."""
    unused = a.new_empty(()).expand(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(unused, a, b, beta=0, alpha=scale)


def _hide(scores: Tensor, first: int, end: int, document_ids_BT: Tensor | None) -> None:
    """Set to −∞ what the queries first .. end − 1 must not see, in place; scores [N, (end − first)·G, end]."""
    num_queries, group = end - first, scores.shape[1] // (end - first)
    later = torch.ones(num_queries, num_queries, dtype=torch.bool).triu_(1).repeat_interleave(group, 0)
    scores[:, :, first:end].masked_fill_(later, float("-inf"))
    if document_ids_BT is not None:
        other = document_ids_BT[:, first:end, None] != document_ids_BT[:, None, :end]
        scores.view(len(other), -1, num_queries, group, end).masked_fill_(other[:, None, :, None], float("-inf"))

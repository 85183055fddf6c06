"""Causal softmax attention: torch's operator, or on CPUs at short lengths our own, which is faster there.

Shapes: B batch, T tokens, H query heads, K key/value heads, G = H/K query heads that share one, D head dim; N = B·K.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.models.precision import as_written

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
        q, k, v = (_by_kv_head(x, num_kv_heads) for x in (q_BTHD, k_BTKD, v_BTKD))
        out, probabilities = torch.empty_like(q), []
        with as_written(q.device):
            for rows, first, end in _blocks(q_BTHD, num_kv_heads):
                scores = _product(q[:, rows], k[:, :end].mT, scale)
                _hide(scores, first, end, q_BTHD.shape[2] // num_kv_heads, document_ids_BT)
                probabilities.append(torch.softmax(scores, dim=-1))
                out[:, rows] = torch.bmm(probabilities[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.num_heads = q_BTHD.shape[2]
        return _by_token(out, q_BTHD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        batch, num_tokens, _, head_dim = dout_BTHD.shape
        num_kv_heads, scale = q.shape[0] // batch, head_dim**-0.5
        dout = _by_kv_head(dout_BTHD, num_kv_heads)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, _, end), p in zip(_blocks(dout_BTHD, num_kv_heads), probabilities, strict=True):
            dv[:, :end] += torch.bmm(p.mT, dout[:, rows])
            dp = torch.bmm(dout[:, rows], v[:, :end].mT)
            dscores = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, rows] = _product(dscores, k[:, :end], scale)
            dk[:, :end] += _product(dscores.mT, q[:, rows], scale)
        kv_shape = (batch, num_tokens, num_kv_heads, head_dim)
        return _by_token(dq, dout_BTHD.shape), _by_token(dk, kv_shape), _by_token(dv, kv_shape), None


def _by_kv_head(x_BTHD: Tensor, num_kv_heads: int) -> Tensor:
    """[N, T·G, D]: heads that share keys and values become rows of one matrix, tokens outermost."""
    batch, num_tokens, _, head_dim = x_BTHD.shape
    grouped = x_BTHD.view(batch, num_tokens, num_kv_heads, -1, head_dim).transpose(1, 2)
    return grouped.reshape(batch * num_kv_heads, -1, head_dim)


def _by_token(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `_by_kv_head`: [B, T, H, D]."""
    batch, num_tokens, _, head_dim = shape
    return x.view(batch, -1, num_tokens, x.shape[1] // num_tokens, head_dim).transpose(1, 2).reshape(shape)


def _blocks(x_BTHD: Tensor, num_kv_heads: int) -> Iterator[tuple[slice, int, int]]:
    """Rows of a block of queries in [N, T·G, D], the first query, and one past the last."""
    _, num_tokens, num_heads, _ = x_BTHD.shape
    group = num_heads // num_kv_heads
    for first in range(0, num_tokens, _QUERIES_PER_BLOCK):
        end = min(first + _QUERIES_PER_BLOCK, num_tokens)
        yield slice(first * group, end * group), first, end


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b, with the scale applied inside the matrix product."""
    unused = a.new_empty(()).expand(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(unused, a, b, beta=0, alpha=scale)


def _hide(scores: Tensor, first: int, end: int, group: int, document_ids_BT: Tensor | None) -> None:
    """Set to −∞ what the queries first .. end − 1 must not see, in place; scores [N, (end − first)·G, end]."""
    num_queries = end - first
    later = torch.ones(num_queries, num_queries, dtype=torch.bool).triu_(1).repeat_interleave(group, 0)
    scores[:, :, first:end].masked_fill_(later, float("-inf"))
    if document_ids_BT is not None:
        other = document_ids_BT[:, first:end, None] != document_ids_BT[:, None, :end]
        scores.view(len(other), -1, num_queries, group, end).masked_fill_(other[:, None, :, None], float("-inf"))

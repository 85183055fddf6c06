"""Block-sparse attention by a dense mask, in plain torch: the oracle of the others; memory grows with S².

Shapes: B samples, S queries, T keys, H query heads, K key/value heads, D head dim.
"""

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout.ranges import END, FIRST, query_bounds
from sparsetrain_kernels.block_layout.visibility import Visibility
from sparsetrain_kernels.precision import as_written


def masked_attention(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over the keys that a mask leaves, differentiable, computed in float32 or better.

    Args:
        q_BSHD: Queries.
        k_BTKD: Keys; K divides H, and query heads h·H/K … read key/value head h.
        v_BTKD: Values.
        mask: Bool [B or 1, H or 1, S, T], True where a query sees a key.
        scale: Factor of the scores.

    Returns:
        Output [B, S, H, D] in q's dtype and log-sum-exp [B, H, S]; 0 and −∞ for a query without keys.
    """
    q, k, v = _spread(q_BSHD, k_BTKD, v_BTKD)
    p, lse = _probabilities(q, k, mask, scale)
    return (p @ v).transpose(1, 2).to(q_BSHD.dtype), lse


def _spread(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> list[Tensor]:
    """[B, H, S, D] in float32 or better, keys and values repeated for the heads that share them."""
    dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    num_heads = q_BSHD.shape[2]
    return [x.transpose(1, 2).to(dtype).repeat_interleave(num_heads // x.shape[2], 1) for x in (q_BSHD, k_BTKD, v_BTKD)]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that the mask leaves, zeros where it leaves none, and log-sum-exp."""
    scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)), lse


def token_mask(visible: Visibility, num_queries: int, num_keys: int) -> Tensor:
    """Which keys each query sees, bool [B or 1, H or 1, S, T]."""
    place = torch.arange(visible.key_blocks.shape[1], device=visible.key_blocks.device)
    first, end = visible.row_ranges[..., FIRST, None], visible.row_ranges[..., END, None]
    num_key_blocks = visible.column_ranges.shape[2]
    listed = (first <= place) & (place < end)  # [B, H, Q, N]
    target = visible.key_blocks[None, :, None].long().expand_as(listed).masked_fill(~listed, num_key_blocks)
    blocks = listed.new_zeros(*listed.shape[:3], num_key_blocks + 1).scatter_(-1, target, True)[..., :-1]
    tokens = blocks.repeat_interleave(visible.block, 2).repeat_interleave(visible.block, 3)
    bounds = visible.bounds
    if bounds is None:
        bounds = query_bounds(num_queries, num_keys, causal=visible.causal, shift=visible.shift, device=place.device)
    key = torch.arange(num_keys, device=place.device)
    inside = (bounds[..., :1] <= key) & (key < bounds[..., 1:])
    return tokens[:, :, :num_queries, :num_keys] & inside[:, None]


def unsupported(q_BSHD: Tensor, block: int) -> str | None:
    """See `implementations.Support`: it runs everywhere."""
    return None


def forward(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, visible: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """See `implementations.Forward`."""
    with as_written(q_BSHD.device):
        mask = token_mask(visible, q_BSHD.shape[1], k_BTKD.shape[1])
        out, lse = masked_attention(q_BSHD, k_BTKD, v_BTKD, mask, scale)
    return out.contiguous(), lse


def backward(
    dout_BSHD: Tensor,
    dlse_BHS: Tensor | None,
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    out_BSHD: Tensor,
    lse_BHS: Tensor,
    visible: Visibility,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `implementations.Backward`."""
    q, k, v = _spread(q_BSHD, k_BTKD, v_BTKD)
    with as_written(q.device):
        dout = dout_BSHD.transpose(1, 2).to(q.dtype)
        p, _ = _probabilities(q, k, token_mask(visible, q.shape[2], k.shape[2]), scale)
        dp = dout @ v.mT
        slope = (dp * p).sum(-1, keepdim=True)
        dscores = p * (dp - (slope if dlse_BHS is None else slope - dlse_BHS.unsqueeze(-1))) * scale
        dq, dk, dv = dscores @ k, dscores.mT @ q, p.mT @ dout
    dk, dv = (d.reshape(len(d), k_BTKD.shape[2], -1, *d.shape[2:]).sum(2) for d in (dk, dv))
    grads = [d.transpose(1, 2).to(q_BSHD.dtype).contiguous() for d in (dq, dk, dv)]
    return grads[0], grads[1], grads[2]

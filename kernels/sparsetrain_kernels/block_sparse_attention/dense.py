"""Block-sparse attention by torch's dense operator: what the other implementations are held against.

Where a layout leaves nothing out, that is plain or causal attention; elsewhere it is attention under a mask of tokens,
which takes memory of S·T and pays off for short sequences alone. A GPU's operators that give the log-sum-exp take no
such mask: there, masked attention is that of `reference`.

Shapes: B samples, S queries, T keys, H query heads, K key/value heads, D head dim.
"""

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout.visibility import Visibility
from sparsetrain_kernels.block_sparse_attention import reference
from sparsetrain_kernels.precision import as_written

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_HEAD_DIMS = range(8, 257, 8)


def unsupported(q_BSHD: Tensor, block: int) -> str | None:
    """See `implementations.Support`: it runs everywhere."""
    return None


def hides_nothing(visible: Visibility, num_queries: int, num_keys: int) -> bool:
    """Whether this is dense attention, causal or not."""
    square = visible.shift == 0 and num_queries == num_keys
    return visible.bounds is None and visible.density == 1.0 and (square or not visible.causal)


def forward(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, visible: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """See `implementations.Forward`."""
    plain = hides_nothing(visible, q_BSHD.shape[1], k_BTKD.shape[1])
    with as_written(q_BSHD.device):
        if q_BSHD.is_cpu:
            return _forward_on_cpu(q_BSHD, k_BTKD, v_BTKD, visible, plain, scale)
        if plain and flash_attention_takes(q_BSHD.dtype, q_BSHD.shape[3]):
            inputs = (_heads_first(x, q_BSHD.shape[2]) for x in (q_BSHD, k_BTKD, v_BTKD))
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out, lse, *_ = flash(*inputs, 0.0, visible.causal, False, scale=scale)
            return out.transpose(1, 2).contiguous(), lse.contiguous()
    return reference.forward(q_BSHD, k_BTKD, v_BTKD, visible, scale)


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
    """See `implementations.Backward`; torch's operators know no gradient of the log-sum-exp, `reference` does."""
    num_queries, num_heads = q_BSHD.shape[1:3]
    num_keys, num_kv_heads = k_BTKD.shape[1:3]
    plain = hides_nothing(visible, num_queries, num_keys)
    on_gpu = plain and q_BSHD.is_cuda and flash_attention_takes(q_BSHD.dtype, q_BSHD.shape[3])
    if dlse_BHS is not None or not (q_BSHD.is_cpu or on_gpu):
        return reference.backward(dout_BSHD, dlse_BHS, q_BSHD, k_BTKD, v_BTKD, out_BSHD, lse_BHS, visible, scale)
    tensors = [_heads_first(x, num_heads) for x in (dout_BSHD, q_BSHD, k_BTKD, v_BTKD, out_BSHD)]
    with as_written(q_BSHD.device):
        if on_gpu:
            unused = torch.zeros(2, dtype=torch.uint64, device=q_BSHD.device)  # the state of no dropout
            flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
            lengths = None, None, num_queries, num_keys
            gradients = flash(*tensors, lse_BHS, *lengths, 0.0, visible.causal, unused, unused[0], scale=scale)
        else:
            mask = None if plain else _mask(visible, num_queries, num_keys, q_BSHD.dtype)
            # A query without keys: whatever its scores, they are 0 beside a log-sum-exp of +∞.
            lse = (lse_BHS if plain else lse_BHS.masked_fill(lse_BHS.isneginf(), float("inf"))).contiguous()
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            gradients = flash(*tensors, lse, 0.0, plain and visible.causal, attn_mask=mask, scale=scale)
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    return dq.contiguous(), _summed(dk, num_kv_heads), _summed(dv, num_kv_heads)


def _forward_on_cpu(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, visible: Visibility, plain: bool, scale: float
) -> tuple[Tensor, Tensor]:
    mask = None if plain else _mask(visible, q_BSHD.shape[1], k_BTKD.shape[1], q_BSHD.dtype)
    inputs = (_heads_first(x, q_BSHD.shape[2]) for x in (q_BSHD, k_BTKD, v_BTKD))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*inputs, 0.0, plain and visible.causal, attn_mask=mask, scale=scale)
    if mask is not None:
        empty = (mask.amax(-1) == float("-inf")).expand(lse.shape)
        out, lse = out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, float("-inf"))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def flash_attention_takes(dtype: torch.dtype, head_dim: int) -> bool:
    """FlashAttention 2's limits on dtype, head dim and the current GPU."""
    return (
        dtype in _FLASH_DTYPES
        and head_dim in _FLASH_HEAD_DIMS
        and torch.cuda.is_available()
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def _mask(visible: Visibility, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """[B or 1, H or 1, S, T]: 0, and −∞ where a query does not see a key."""
    hidden = ~reference.token_mask(visible, num_queries, num_keys)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _heads_first(x_BSHD: Tensor, num_heads: int) -> Tensor:
    """[B, num_heads, S, D], its last dimension dense, heads repeated where there are fewer."""
    x = x_BSHD if x_BSHD.stride(3) == 1 else x_BSHD.contiguous()
    return (x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], 2)).transpose(1, 2)


def _summed(d_BTHD: Tensor, num_kv_heads: int) -> Tensor:
    """[B, T, K, D], contiguous: the gradient of heads that were repeated."""
    if d_BTHD.shape[2] == num_kv_heads:
        return d_BTHD.contiguous()
    return d_BTHD.reshape(*d_BTHD.shape[:2], num_kv_heads, -1, d_BTHD.shape[3]).sum(3)

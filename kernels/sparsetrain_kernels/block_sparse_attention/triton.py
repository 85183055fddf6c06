"""Block-sparse attention in Triton: tiles, launches, and what the kernels cannot do."""

from typing import Any

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.block_layout.visibility import Visibility
from sparsetrain_kernels.block_sparse_attention.triton_kernels import (
    delta_kernel,
    dk_dv_kernel,
    dq_kernel,
    forward_kernel,
)
from sparsetrain_kernels.current_device import on_its_device
from sparsetrain_kernels.precision import INTERPRETED, of_triton_products

_MIN_TILE, _MAX_HEAD_DIM = 16, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(q_BSHD: Tensor, block: int) -> str | None:
    """See `implementations.Support`."""
    if not q_BSHD.is_cuda and not INTERPRETED:
        return f"q is on {q_BSHD.device}; move it to a GPU, or pass implementation=None"
    if q_BSHD.dtype not in _DTYPES:
        return f"q is {q_BSHD.dtype}; pass float32, bfloat16 or float16, or implementation='reference'"
    if q_BSHD.shape[3] > _MAX_HEAD_DIM:
        return f"the head dim is {q_BSHD.shape[3]}; at most {_MAX_HEAD_DIM} will do, or implementation='reference'"
    if block % _MIN_TILE:
        return f"layout.block is {block}; use a multiple of {_MIN_TILE}, or implementation='reference'"
    return None


@on_its_device
def forward(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, visible: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """See `implementations.Forward`."""
    q, k, v = (_dense_rows(x) for x in (q_BSHD, k_BTKD, v_BTKD))
    batch, num_queries, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=q.device)
    tile, launch = _tiles(q, visible.block, backward=False)
    forward_kernel[(triton.cdiv(num_queries, tile) * batch * num_heads,)](
        q,
        k,
        v,
        out,
        lse,
        visible.key_blocks,
        visible.row_ranges,
        _bounds_or_any(visible),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *_list_strides(visible.key_blocks, visible.row_ranges, visible.bounds),
        num_queries,
        k.shape[1],
        num_heads,
        num_heads // k.shape[2],
        visible.shift,
        scale,
        **_constants(q, visible),
        **launch,
    )
    return out, lse


@on_its_device
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
    q, k, v, dout = (_dense_rows(x) for x in (q_BSHD, k_BTKD, v_BTKD, dout_BSHD))
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    constants = _constants(q, visible)
    tile, launch = _tiles(q, visible.block, backward=True)
    delta = torch.empty_like(lse_BHS)
    delta_kernel[(triton.cdiv(num_queries, tile) * batch * num_heads,)](
        out_BSHD.contiguous(),
        dout,
        lse_BHS if dlse_BHS is None else dlse_BHS.contiguous(),  # not read where there is none
        delta,
        *dout.stride()[:3],
        num_queries,
        num_heads,
        HEAD_DIM=head_dim,
        D=constants["D"],
        M=tile,
        HAS_DLSE=dlse_BHS is not None,
    )
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inputs = q, k, v, dout, lse_BHS.contiguous(), delta
    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:3]]
    group = num_heads // num_kv_heads
    dq_kernel[(triton.cdiv(num_queries, tile) * batch * num_heads,)](
        *inputs,
        dq,
        visible.key_blocks,
        visible.row_ranges,
        _bounds_or_any(visible),
        *strides,
        *_list_strides(visible.key_blocks, visible.row_ranges, visible.bounds),
        num_queries,
        num_keys,
        num_heads,
        group,
        visible.shift,
        scale,
        **constants,
        **launch,
    )
    dk_dv_kernel[(triton.cdiv(num_keys, tile) * batch * num_kv_heads,)](
        *inputs,
        dk,
        dv,
        visible.query_blocks,
        visible.column_ranges,
        _bounds_or_any(visible),
        *strides,
        *_list_strides(visible.query_blocks, visible.column_ranges, visible.bounds),
        num_queries,
        num_keys,
        num_kv_heads,
        group,
        visible.shift,
        scale,
        **constants,
        **launch,
    )
    return dq, dk, dv


def _bounds_or_any(visible: Visibility) -> Tensor:
    """The bounds, or a tensor that is not read where there are none: kernels form the address all the same."""
    return visible.row_ranges if visible.bounds is None else visible.bounds


def _dense_rows(x_BSHD: Tensor) -> Tensor:
    """With a contiguous last dimension, which gradients of sums, expanded from one number, have not."""
    return x_BSHD if x_BSHD.stride(3) == 1 else x_BSHD.contiguous()


def _list_strides(lists: Tensor, ranges: Tensor, bounds: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of a head's list, of a sample's and a head's ranges, and of a sample's bounds; 0 where shared."""

    def stride(x: Tensor, dim: int) -> int:
        return x.stride(dim) if x.shape[dim] > 1 else 0

    return stride(lists, 0), stride(ranges, 0), stride(ranges, 1), 0 if bounds is None else stride(bounds, 0)


def _tiles(q: Tensor, block: int, *, backward: bool) -> tuple[int, dict[str, Any]]:
    """Queries and keys of a tile, and launch options with which registers do not spill and 99 KiB of memory suffice."""
    dim = triton.next_power_of_2(q.shape[3])
    if q.dtype == torch.float32:
        largest = 32 if dim <= 64 else 16
    elif dim <= 64 and not backward:
        largest = 128
    else:
        largest = 64 if dim <= 128 else 32
    tile = min(largest, block & -block)  # a power of two that divides the block
    num_warps = 8 if tile == 128 or (backward and dim >= 128) else 4
    return tile, {"M": tile, "N": tile, "num_warps": num_warps, "num_stages": 2}


def _constants(q: Tensor, visible: Visibility) -> dict[str, Any]:
    return {
        "HEAD_DIM": q.shape[3],
        "D": max(_MIN_TILE, triton.next_power_of_2(q.shape[3])),
        "BLOCK": visible.block,
        "CAUSAL": visible.causal,
        "HAS_BOUNDS": visible.bounds is not None,
        **of_triton_products(q),
    }

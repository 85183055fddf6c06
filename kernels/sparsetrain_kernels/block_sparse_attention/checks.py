"""What a call of block-sparse attention must bring along, and what is said when it does not."""

from math import isfinite

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout import BlockLayout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q is [B, S, H, D], k and v are [B, T, K, D], K divides H, and all are of a kind."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: must be a tensor [batch, tokens, heads, head dim]")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes}: must be [batch, tokens, heads, head dim]")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: k and v must have one shape, and the batch and head dim of q")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"{shapes}: no size may be 0")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: the {k.shape[2]} heads of k and v must divide the {q.shape[2]} heads of q")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: must all be one of {allowed}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}: move them to one device")


def check_layout(layout: BlockLayout, q: Tensor, k: Tensor, *, causal: bool) -> None:
    """Raise ValueError unless the layout fits the heads, lengths and device of q and k, and whether to be causal."""
    if not isinstance(layout, BlockLayout):
        raise ValueError(
            f"layout is a {type(layout).__name__}: must be a BlockLayout; BlockLayout.from_mask makes one of a mask of "
            "blocks, BlockLayout.from_block_mask one of FlexAttention's BlockMask"
        )
    if layout.num_heads not in (1, q.shape[2]):
        raise ValueError(
            f"layout has lists for {layout.num_heads} heads but q has {q.shape[2]}: "
            f"build it with num_heads={q.shape[2]}, or with one pattern for all"
        )
    layout.check_lengths(q.shape[1], k.shape[1])
    if layout.device != q.device:
        raise ValueError(f"layout is on {layout.device} but q is on {q.device}: pass layout.to(q.device)")
    if not isinstance(causal, bool):
        raise ValueError(f"causal={causal!r}: must be True or False")
    if causal and layout.blind_if_causal is not None:
        head, row = layout.blind_if_causal
        raise ValueError(
            f"causal=True: query block {row} of head {head} would see no key, as layout was built with causal=False; "
            "build it with causal=True, or with allow_empty=True for zeros there"
        )


def check_documents(cu_seqlens: Tensor, layout: BlockLayout, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless `cu_seqlens` are integers on q's device; on a CPU, unless they ascend to the end."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}: must be an integer tensor [documents + 1]")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: must be int32 or int64 [documents + 1]"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} but q is on {q.device}: move it there")
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders != sorted(borders):
        raise ValueError(f"cu_seqlens={_short(borders)}: must start with 0 and ascend")
    is_whole = not layout.is_slice and q.shape[1] == k.shape[1]
    if is_whole and borders[-1] not in (k.shape[1], k.shape[0] * k.shape[1]):
        raise ValueError(
            f"cu_seqlens={_short(borders)} ends at {borders[-1]}: must end at {k.shape[1]}, the tokens of a sample, "
            f"or at {k.shape[0] * k.shape[1]}, those of all {k.shape[0]} samples one after the other"
        )


def check_scale(scale: float) -> None:
    """Raise ValueError unless it is a finite number."""
    if not isinstance(scale, int | float) or not isfinite(scale):
        raise ValueError(f"scale={scale!r}: must be a finite number, or None for 1/√(head dim)")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, …, {values[-1]}]"

"""Block-sparse attention as a torch operator: eager, autograd, `torch.compile(fullgraph=True)`.

Shapes: B samples, S queries, T keys, H query heads, K key/value heads, D head dim.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from sparsetrain_kernels.block_layout import BlockLayout
from sparsetrain_kernels.block_layout.visibility import Visibility
from sparsetrain_kernels.block_sparse_attention.checks import check_documents, check_layout, check_scale, check_tensors
from sparsetrain_kernels.block_sparse_attention.implementations import BACKWARD, FORWARD, check_name, problem_of


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, each query over the keys in the blocks that a layout lists for it.

    Differentiable in q, k and v, through the output and through the log-sum-exp; equal inputs give equal bits.

    Args:
        q: Queries, [B, S, H, D], float32, bfloat16, float16 or float64, any strides.
        k: Keys, [B, T, K, D]; K divides H, and query heads h·H/K … (h + 1)·H/K − 1 read key/value head h. T = S unless
            the layout is a slice.
        v: Values, [B, T, K, D].
        layout: Blocks for H heads, or for all alike, on q's device.
        causal: Hide later keys. A slice's queries and keys keep the places that they had in the whole.
        scale: Factor of the scores; 1/√D by default.
        cu_seqlens: int32 or int64 [documents + 1] on q's device, ascending from 0: the first token of each document and
            the end of the last; a query sees keys of its own document only. Ending at S, they are the documents of
            every sample; ending at B·S, those of all samples one after the other. With a slice they end at the
            length of the whole sequence.
        return_lse: Return the log-sum-exp as well: parts of the keys attended to apart are combined by it.
        implementation: reference | dense | cpu | triton; by default the dispatcher's choice, for each pass its own: see
            `sparsetrain_kernels.dispatch.explain`, operations block_sparse_attention.output and .gradients.

    Returns:
        [B, S, H, D] in the dtype of q, and with `return_lse` the natural logarithm of the softmax's denominators
        [B, H, S] in float32 (float64 for float64). A query that sees no key (of a mask, a slice, a union or an
        intersection of layouts, or a layout built with allow_empty) gets 0, and −∞.

    Raises:
        ValueError: Shapes, dtypes, devices, layout, documents or scale do not fit, or the implementation cannot do it.
    """
    check_tensors(q, k, v)
    check_layout(layout, q, k, causal=causal)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, layout, q, k)
    if scale is not None and not torch.compiler.is_compiling():
        check_scale(scale)
    if implementation is not None:
        check_name(implementation, q, layout.block)
    visible = layout.visibility(q.shape[0], q.shape[1], k.shape[1], causal=causal, cu_seqlens=cu_seqlens)
    out, lse = _forward(q, k, v, *_flat(visible), q.shape[3] ** -0.5 if scale is None else scale, implementation)
    return (out, lse) if return_lse else out


_FlatVisibility = tuple[int, bool, int, Tensor, Tensor, Tensor, Tensor, float, Tensor | None]


def _flat(visible: Visibility) -> _FlatVisibility:
    """The fields in order: operators take no objects."""
    lists = visible.key_blocks, visible.row_ranges, visible.query_blocks, visible.column_ranges
    return (visible.block, visible.causal, visible.shift, *lists, visible.density, visible.bounds)


@torch.library.custom_op("sparsetrain::block_sparse_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    causal: bool,
    shift: int,
    key_blocks: Tensor,
    row_ranges: Tensor,
    query_blocks: Tensor,
    column_ranges: Tensor,
    density: float,
    bounds: Tensor | None,
    scale: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    lists = key_blocks, row_ranges, query_blocks, column_ranges
    visible = Visibility(block, causal, shift, *lists, density, bounds)
    arguments = q, k, v, visible, scale
    if implementation is not None:
        return FORWARD.implementations[implementation].run(*arguments)  # type: ignore[no-any-return]
    return FORWARD.run(q, problem_of(q, k, visible), *arguments)  # type: ignore[no-any-return]


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, num_queries, num_heads, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, num_heads, num_queries), dtype=lse_dtype)


@torch.library.custom_op("sparsetrain::block_sparse_attention_backward", mutates_args=())
def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: int,
    causal: bool,
    shift: int,
    key_blocks: Tensor,
    row_ranges: Tensor,
    query_blocks: Tensor,
    column_ranges: Tensor,
    density: float,
    bounds: Tensor | None,
    scale: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = key_blocks, row_ranges, query_blocks, column_ranges
    visible = Visibility(block, causal, shift, *lists, density, bounds)
    dout = torch.zeros_like(out) if dout is None else dout
    arguments = dout, dlse, q, k, v, out, lse, visible, scale
    if implementation is not None:
        return BACKWARD.implementations[implementation].run(*arguments)  # type: ignore[no-any-return]
    return BACKWARD.run(q, problem_of(q, k, visible, lse_gradient=dlse is not None), *arguments)  # type: ignore[no-any-return]


@_backward.register_fake
def _(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block, causal, shift, *lists, density, bounds, scale, implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *lists, bounds)
    ctx.constants = block, causal, shift, density, scale, implementation


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *lists, bounds = ctx.saved_tensors
    block, causal, shift, density, scale, implementation = ctx.constants
    visible = block, causal, shift, *lists, density, bounds
    dq, dk, dv = _backward(dout, dlse, q, k, v, out, lse, *visible, scale, implementation)
    return dq, dk, dv, *[None] * 11


_forward.register_autograd(_gradients, setup_context=_keep)

"""The three products on a GPU in Triton.

Deterministic: every entry of a result is summed by one program in a fixed order.
T tokens, N outputs, K inputs; r x c entries of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.layout import Grid, unpack_index
from sparsetrain_kernels.current_device import on_its_device
from sparsetrain_kernels.precision import of_triton_products

_MAX_TILE = 64
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Sizes of blocks, in either direction, that the kernels are written for."""


def output(x_TK: Tensor, weight: Tensor, bias_N: Tensor | None, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """x Wᵀ + bias [T, N]; `zeroed` makes no difference, dead blocks are not read."""
    lists = unpack_index(index, grid)
    y_TN = x_TK.new_empty(len(x_TK), grid.shape[0])
    return _gather_products(x_TK, weight, bias_N, y_TN, lists.row_starts, lists.columns, None, grid)


def input_gradient(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """dy W [T, K]."""
    lists = unpack_index(index, grid)
    dx_TK = dy_TN.new_empty(len(dy_TN), grid.shape[1])
    return _gather_products(dy_TN, weight, None, dx_TK, lists.column_starts, lists.rows, lists.order, grid)


@on_its_device
def weight_gradient(dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: Grid, packed: bool, dtype: torch.dtype) -> Tensor:
    """The living blocks of dyᵀ x, packed or in a dense tensor of zeros."""
    lists = unpack_index(index, grid)
    num_blocks = len(lists.columns)
    shape = (num_blocks, *grid[2:]) if packed else grid.shape
    gradient = (dy_TN.new_empty if packed else dy_TN.new_zeros)(shape, dtype=dtype)
    if num_blocks == 0 or gradient.numel() == 0:
        return gradient
    rows, columns = lists.places()
    tile_r, tile_c = min(grid.block_rows, _MAX_TILE), min(grid.block_columns, _MAX_TILE)
    programs = (num_blocks, (grid.block_rows // tile_r) * (grid.block_columns // tile_c))
    _weight_gradient_kernel[programs](
        dy_TN,
        x_TK,
        gradient,
        rows.contiguous(),
        columns.contiguous(),
        len(x_TK),
        *grid.shape,
        BLOCK_R=grid.block_rows,
        BLOCK_C=grid.block_columns,
        TILE_R=tile_r,
        TILE_C=tile_c,
        TILE_T=32,
        PACKED=packed,
        **of_triton_products(x_TK),
    )
    return gradient


@on_its_device
def _gather_products(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    starts: Tensor,
    others: Tensor,
    order: Tensor | None,
    grid: Grid,
) -> Tensor:
    """Per list of blocks, the sum of products of slabs of `a` with its blocks: out = a Wᵀ by rows, a W by columns."""
    if out.numel() == 0:
        return out
    weight = weight.to(a.dtype)
    by_column = order is not None
    block_in, block_out = grid[2:] if by_column else (grid.block_columns, grid.block_rows)
    tile_in, tile_out, tile_t = min(block_in, _MAX_TILE), min(block_out, 2 * _MAX_TILE), 16 if len(a) <= 16 else 64
    programs = (triton.cdiv(len(a), tile_t), out.shape[1] // tile_out)
    _gather_products_kernel[programs](
        a,
        weight,
        bias,
        out,
        starts,
        others,
        order,
        len(a),
        a.shape[1],
        out.shape[1],
        grid.shape[1],
        BLOCK_IN=block_in,
        BLOCK_OUT=block_out,
        TILE_T=tile_t,
        TILE_IN=tile_in,
        TILE_OUT=tile_out,
        BY_COLUMN=by_column,
        PACKED=weight.ndim == 3,
        **of_triton_products(a),
    )
    return out


@triton.jit
def _gather_products_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    starts_ptr,
    others_ptr,
    order_ptr,
    T,
    IN,
    OUT,
    K,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile [TILE_T, TILE_OUT] of the result per program; its list says which slabs of `a` meet which blocks."""
    first_out = tl.program_id(1).to(tl.int64) * TILE_OUT
    list_number = first_out // BLOCK_OUT
    inside_out = first_out % BLOCK_OUT + tl.arange(0, TILE_OUT)  # place inside the block
    token = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    exists = (token < T)[:, None]
    total = tl.zeros((TILE_T, TILE_OUT), dtype=tl.float32)
    for place in range(tl.load(starts_ptr + list_number), tl.load(starts_ptr + list_number + 1)):
        other = tl.load(others_ptr + place).to(tl.int64)
        if PACKED:
            number = tl.cast(tl.load(order_ptr + place) if BY_COLUMN else place, tl.int64)
            block_ptr = w_ptr + number * BLOCK_IN * BLOCK_OUT
            row_stride = BLOCK_OUT if BY_COLUMN else BLOCK_IN
        else:
            if BY_COLUMN:
                block_ptr = w_ptr + other * BLOCK_IN * K + list_number * BLOCK_OUT
            else:
                block_ptr = w_ptr + list_number * BLOCK_OUT * K + other * BLOCK_IN
            row_stride = K
        for first_in in range(0, BLOCK_IN, TILE_IN):
            inside_in = first_in + tl.arange(0, TILE_IN)
            a = tl.load(a_ptr + token[:, None] * IN + other * BLOCK_IN + inside_in[None, :], mask=exists, other=0.0)
            if BY_COLUMN:
                w = tl.load(block_ptr + inside_in[:, None] * row_stride + inside_out[None, :])
            else:
                w = tl.load(block_ptr + inside_out[None, :] * row_stride + inside_in[:, None])
            if UPCAST:
                a, w = a.to(tl.float32), w.to(tl.float32)
            total = tl.dot(a, w, total, input_precision=PRECISION)
    column = first_out + tl.arange(0, TILE_OUT)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    tl.store(out_ptr + token[:, None] * OUT + column[None, :], total.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _weight_gradient_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,
    rows_ptr,
    columns_ptr,
    T,
    N,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_T: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile [TILE_R, TILE_C] of one living block per program, summed over all tokens."""
    number = tl.program_id(0).to(tl.int64)
    tiles_across = BLOCK_C // TILE_C
    inside_r = tl.program_id(1) // tiles_across * TILE_R + tl.arange(0, TILE_R)
    inside_c = tl.program_id(1) % tiles_across * TILE_C + tl.arange(0, TILE_C)
    n = tl.load(rows_ptr + number).to(tl.int64) * BLOCK_R + inside_r
    k = tl.load(columns_ptr + number).to(tl.int64) * BLOCK_C + inside_c
    total = tl.zeros((TILE_R, TILE_C), dtype=tl.float32)
    for first in range(0, T, TILE_T):
        token = (first + tl.arange(0, TILE_T)).to(tl.int64)
        dy = tl.load(dy_ptr + token[None, :] * N + n[:, None], mask=(token < T)[None, :], other=0.0)
        x = tl.load(x_ptr + token[:, None] * K + k[None, :], mask=(token < T)[:, None], other=0.0)
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        total = tl.dot(dy, x, total, input_precision=PRECISION)
    if PACKED:
        target = dw_ptr + number * BLOCK_R * BLOCK_C + inside_r[:, None] * BLOCK_C + inside_c[None, :]
    else:
        target = dw_ptr + n[:, None] * K + k[None, :]
    tl.store(target, total.to(dw_ptr.dtype.element_ty))

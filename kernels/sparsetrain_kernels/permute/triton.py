"""Permutation on a GPU in Triton: each row or token is written by one program, which adds in the order of rows.

Shapes: T tokens, R rows, D model dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain_kernels.permute.order import rows_by_token


def gather(x_TD: Tensor, token_R: Tensor) -> Tensor:
    """Row r is x[token_R[r]]."""
    out_RD = x_TD.new_empty(len(token_R), x_TD.shape[1])
    if out_RD.numel() > 0:
        block = _block(x_TD)
        programs = len(token_R), triton.cdiv(x_TD.shape[1], block)
        _gather_kernel[programs](x_TD, token_R, out_RD, x_TD.shape[1], BLOCK_D=block)
    return out_RD


def combine(y_RD: Tensor, weight_R: Tensor | None, token_R: Tensor, num_tokens: int) -> Tensor:
    """A token's rows, multiplied by their weights and added up in float32; [T, D] in the dtype of y."""
    row_R, first_T = rows_by_token(token_R, num_tokens)
    out_TD = y_RD.new_empty(num_tokens, y_RD.shape[1])
    if out_TD.numel() > 0:
        block = _block(y_RD)
        programs = num_tokens, triton.cdiv(y_RD.shape[1], block)
        _combine_kernel[programs](y_RD, weight_R, row_R, first_T, out_TD, y_RD.shape[1], BLOCK_D=block)
    return out_TD


def combine_backward(dy_TD: Tensor, y_RD: Tensor, weight_R: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `combine` by rows, in their dtype, and by weights, in theirs."""
    dy_RD, dweight_R = torch.empty_like(y_RD), torch.empty_like(weight_R)
    if len(token_R) > 0:
        _combine_backward_kernel[len(token_R),](
            dy_TD, y_RD, weight_R, token_R, dy_RD, dweight_R, y_RD.shape[1], BLOCK_D=_block(y_RD)
        )
    return dy_RD, dweight_R


def _block(x: Tensor) -> int:
    return min(1024, int(triton.next_power_of_2(max(x.shape[1], 1))))


@triton.jit
def _gather_kernel(x_ptr, token_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + tl.load(token_ptr + row).to(tl.int64) * D + d, mask=d < D)
    tl.store(out_ptr + row * D + d, x, mask=d < D)


@triton.jit
def _combine_kernel(y_ptr, weight_ptr, row_ptr, first_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for place in range(tl.load(first_ptr + token), tl.load(first_ptr + token + 1)):
        row = tl.load(row_ptr + place).to(tl.int64)
        y = tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + row).to(tl.float32)
        total += y
    tl.store(out_ptr + token * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _combine_backward_kernel(dy_ptr, y_ptr, weight_ptr, token_ptr, dy_rows_ptr, dweight_ptr, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    products = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        dy = tl.load(dy_ptr + token * D + d, mask=d < D, other=0.0).to(tl.float32)
        products += dy * tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dy_rows_ptr + row * D + d, (dy * weight).to(dy_rows_ptr.dtype.element_ty), mask=d < D)
    tl.store(dweight_ptr + row, tl.sum(products, 0).to(dweight_ptr.dtype.element_ty))

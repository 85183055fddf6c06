"""Kernels of the permutation in Triton. T tokens, R rows, D model dim, A assignments, E experts."""

import triton
import triton.language as tl


@triton.jit
def gather_kernel(x_ptr, token_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    """A slice of one row: x[token[row]]."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + tl.load(token_ptr + row).to(tl.int64) * D + d, mask=d < D)
    tl.store(out_ptr + row * D + d, x, mask=d < D)


@triton.jit
def combine_kernel(y_ptr, weight_ptr, row_ptr, first_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    """A slice of one token: the weighted sum of its rows, in their order."""
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
def combine_backward_kernel(dy_ptr, y_ptr, weight_ptr, token_ptr, dy_rows_ptr, dweight_ptr, D, BLOCK_D: tl.constexpr):
    """One row: the gradient of its token times its weight, and the gradient by the weight."""
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


@triton.jit
def count_kernel(expert_ptr, counts_ptr, A, E, BLOCK_A: tl.constexpr, E_PADDED: tl.constexpr):
    """How many assignments of a block each expert has."""
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    e = tl.arange(0, E_PADDED)
    expert = tl.load(expert_ptr + a, mask=a < A, other=-1)
    is_its = (expert[:, None] == e[None, :]).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * E + e, tl.sum(is_its, 0).to(tl.int64), mask=e < E)


@triton.jit
def place_kernel(
    expert_ptr,
    first_ptr,
    token_ptr,
    row_ptr,
    A,
    E,
    TOP_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    E_PADDED: tl.constexpr,
):
    """The rows of a block's assignments: behind those of the same expert in the block and in earlier blocks."""
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    e = tl.arange(0, E_PADDED)
    expert = tl.load(expert_ptr + a, mask=a < A, other=-1)
    is_its = expert[:, None] == e[None, :]
    first = tl.load(first_ptr + tl.program_id(0).to(tl.int64) * E + e, mask=e < E, other=0)
    inside = tl.cumsum(is_its.to(tl.int32), 0) - 1
    row = tl.sum(tl.where(is_its, first[None, :] + inside, 0), 1)
    tl.store(row_ptr + a, row, mask=a < A)
    tl.store(token_ptr + row, (a // TOP_K).to(tl.int64), mask=a < A)

"""Kernels of the experts in Triton: grouped products over ragged groups of rows, with what comes before and after them.

A group is the rows of an expert, `ends[e - 1]` to `ends[e]`. Which expert and rows a program has, it finds out itself,
so that nothing waits for the host; programs beyond the last tile leave at once. Every entry of a result is summed by
one program in a fixed order. R rows, E experts, D model dim, F hidden dim, H = 2F (gate, then up) where gated, else F.
"""

import triton
import triton.language as tl


@triton.jit
def _find_tile(ends_ptr, E, tile, BLOCK_M: tl.constexpr, E_PADDED: tl.constexpr):
    """The expert of a tile of rows, its first row, and one past the expert's last; both 0 where there is none."""
    e = tl.arange(0, E_PADDED)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    tiles_so_far = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_so_far <= tile).to(tl.int32), 0)
    inside = tile - (tiles_so_far - tiles)
    first_row = tl.sum(tl.where(e == expert, start + inside * BLOCK_M, 0), 0)
    return expert.to(tl.int64), first_row, tl.sum(tl.where(e == expert, end, 0), 0)


@triton.jit
def _of_expert(ptr, place_ptr, expert, place_in_stack, UNIT: tl.constexpr):
    """Where an expert's matrix begins: at its place in units, or where there are none, in a stack."""
    return ptr + place_in_stack if place_ptr is None else ptr + tl.load(place_ptr + expert) * UNIT


@triton.jit
def _gelu_parts(x):
    """sigmoid(2u) with gelu(x) = x · sigmoid(2u), which is its tanh form, and du/dx."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return tl.sigmoid(2 * u), 0.7978845608028654 * (1 + 0.134145 * x * x)


@triton.jit
def hidden_kernel(
    x_ptr,
    token_ptr,
    w_ptr,
    w_place_ptr,
    bias_ptr,
    bias_place_ptr,
    h_ptr,
    a_ptr,
    ends_ptr,
    E,
    D,
    F,
    GATED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    E_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h [R, H] = x[token] w_inᵀ + bias and a [R, F] = silu(gate) · up, or gelu(h): a tile [BLOCK_M, BLOCK_N] of a."""
    expert, first_row, end_row = _find_tile(ends_ptr, E, tl.program_id(1), BLOCK_M, E_PADDED)
    if first_row >= end_row:
        return
    H = 2 * F if GATED else F
    row = first_row + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row, has_n = row < end_row, n < F
    source = tl.load(token_ptr + row, mask=has_row, other=0) if token_ptr is not None else row
    x_row = x_ptr + source.to(tl.int64)[:, None] * D
    w = _of_expert(w_ptr, w_place_ptr, expert, expert * H * D, UNIT)
    w_col = w + n.to(tl.int64)[None, :] * D
    w_up_col = w + (n.to(tl.int64) + F)[None, :] * D
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, D, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        has_w = (k < D)[:, None] & has_n[None, :]
        x = tl.load(x_row + k[None, :], mask=has_row[:, None] & (k < D)[None, :], other=0.0)
        w_gate = tl.load(w_col + k[:, None], mask=has_w, other=0.0)
        if UPCAST:
            x, w_gate = x.to(tl.float32), w_gate.to(tl.float32)
        first = tl.dot(x, w_gate, first, input_precision=PRECISION)
        if GATED:
            w_up = tl.load(w_up_col + k[:, None], mask=has_w, other=0.0)
            if UPCAST:
                w_up = w_up.to(tl.float32)
            second = tl.dot(x, w_up, second, input_precision=PRECISION)
    exists = has_row[:, None] & has_n[None, :]
    if bias_ptr is not None:
        bias = _of_expert(bias_ptr, bias_place_ptr, expert, expert * H, UNIT)
        first += tl.load(bias + n, mask=has_n, other=0.0).to(tl.float32)[None, :]
    h_place = row.to(tl.int64)[:, None] * H + n[None, :]
    tl.store(h_ptr + h_place, first.to(h_ptr.dtype.element_ty), mask=exists)
    if GATED:
        if bias_ptr is not None:
            second += tl.load(bias + F + n, mask=has_n, other=0.0).to(tl.float32)[None, :]
        tl.store(h_ptr + h_place + F, second.to(h_ptr.dtype.element_ty), mask=exists)
        a = first * tl.sigmoid(first) * second
    else:
        a = first * _gelu_parts(first)[0]
    tl.store(a_ptr + row.to(tl.int64)[:, None] * F + n[None, :], a.to(a_ptr.dtype.element_ty), mask=exists)


@triton.jit
def hidden_gradient_kernel(
    dy_ptr,
    w_ptr,
    w_place_ptr,
    h_ptr,
    a_ptr,
    dh_ptr,
    ends_ptr,
    E,
    D,
    F,
    GATED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    E_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dh [R, H], the gradient by h, and a [R, F] again, from dy w_out and h: a tile [BLOCK_M, BLOCK_N] of a."""
    expert, first_row, end_row = _find_tile(ends_ptr, E, tl.program_id(1), BLOCK_M, E_PADDED)
    if first_row >= end_row:
        return
    H = 2 * F if GATED else F
    row = first_row + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row, has_n = row < end_row, n < F
    w = _of_expert(w_ptr, w_place_ptr, expert, expert * D * F, UNIT)
    da = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, D, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        dy_place = row.to(tl.int64)[:, None] * D + k[None, :]
        dy = tl.load(dy_ptr + dy_place, mask=has_row[:, None] & (k < D)[None, :], other=0.0)
        w_place = k.to(tl.int64)[:, None] * F + n[None, :]
        w_out = tl.load(w + w_place, mask=(k < D)[:, None] & has_n[None, :], other=0.0)
        if UPCAST:
            dy, w_out = dy.to(tl.float32), w_out.to(tl.float32)
        da = tl.dot(dy, w_out, da, input_precision=PRECISION)
    exists = has_row[:, None] & has_n[None, :]
    h_place = row.to(tl.int64)[:, None] * H + n[None, :]
    h = tl.load(h_ptr + h_place, mask=exists, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(h_ptr + h_place + F, mask=exists, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(h)
        a = h * sigmoid * up
        dh = da * up * sigmoid * (1 + h * (1 - sigmoid))
        tl.store(dh_ptr + h_place + F, (da * h * sigmoid).to(dh_ptr.dtype.element_ty), mask=exists)
    else:
        sigmoid, slope = _gelu_parts(h)
        a = h * sigmoid
        dh = da * (sigmoid + 2 * h * sigmoid * (1 - sigmoid) * slope)
    tl.store(dh_ptr + h_place, dh.to(dh_ptr.dtype.element_ty), mask=exists)
    tl.store(a_ptr + row.to(tl.int64)[:, None] * F + n[None, :], a.to(a_ptr.dtype.element_ty), mask=exists)


@triton.jit
def product_kernel(
    a_ptr,
    w_ptr,
    w_place_ptr,
    bias_ptr,
    bias_place_ptr,
    out_ptr,
    ends_ptr,
    E,
    K,
    N,
    w_stride_e,
    w_stride_k,
    w_stride_n,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    E_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out [R, N] = a [R, K] w[e] + bias[e], with w [E, K, N] of any strides: a tile [BLOCK_M, BLOCK_N]."""
    expert, first_row, end_row = _find_tile(ends_ptr, E, tl.program_id(1), BLOCK_M, E_PADDED)
    if first_row >= end_row:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row, has_n = row < end_row, n < N
    a_row = a_ptr + row.to(tl.int64)[:, None] * K
    begin = _of_expert(w_ptr, w_place_ptr, expert, expert * w_stride_e, UNIT)
    w_col = begin + n.to(tl.int64)[None, :] * w_stride_n
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        a = tl.load(a_row + k[None, :], mask=has_row[:, None] & (k < K)[None, :], other=0.0)
        w_place = w_col + k.to(tl.int64)[:, None] * w_stride_k
        w = tl.load(w_place, mask=(k < K)[:, None] & has_n[None, :], other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = _of_expert(bias_ptr, bias_place_ptr, expert, expert * N, UNIT)
        total += tl.load(bias + n, mask=has_n, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=has_row[:, None] & has_n[None, :])


@triton.jit
def weight_gradient_kernel(
    left_ptr,
    right_ptr,
    token_ptr,
    out_ptr,
    out_place_ptr,
    bias_out_ptr,
    bias_out_place_ptr,
    ends_ptr,
    N,
    K,
    ADD: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out [N, K] (+)= leftᵀ right[token], and sums of left [N], of each expert: a tile [BLOCK_N, BLOCK_K]."""
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    has_n, has_k = n < N, k < K
    end_row = tl.load(ends_ptr + expert)
    start_row = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    if ADD:  # noqa: SIM102 (decided when the kernel is compiled)
        if start_row >= end_row:
            return
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first_row in range(start_row, end_row, BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        has_row = row < end_row
        source = tl.load(token_ptr + row, mask=has_row, other=0) if token_ptr is not None else row
        left_place = row.to(tl.int64)[None, :] * N + n[:, None]
        left = tl.load(left_ptr + left_place, mask=has_row[None, :] & has_n[:, None], other=0.0)
        right_place = source.to(tl.int64)[:, None] * K + k[None, :]
        right = tl.load(right_ptr + right_place, mask=has_row[:, None] & has_k[None, :], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        if bias_out_ptr is not None:
            sums += tl.sum(left.to(tl.float32), 1)
    out = _of_expert(out_ptr, out_place_ptr, expert, expert * N * K, UNIT)
    out += n.to(tl.int64)[:, None] * K + k[None, :]
    exists = has_n[:, None] & has_k[None, :]
    if ADD:
        total = total + tl.load(out, mask=exists, other=0.0)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=exists)
    if bias_out_ptr is not None:  # noqa: SIM102 (the compiler drops it where it is None)
        if tl.program_id(1) == 0:
            bias_out = _of_expert(bias_out_ptr, bias_out_place_ptr, expert, expert * N, UNIT) + n
            if ADD:
                sums = sums + tl.load(bias_out, mask=has_n, other=0.0)
            tl.store(bias_out, sums.to(bias_out_ptr.dtype.element_ty), mask=has_n)

"""Block-sparse attention in Triton: the kernels.

One program holds a tile of queries (or, for the gradients of keys and values, of keys) and walks the blocks that a list
gives it: partial blocks, full blocks, partial blocks, so that only the first and last evaluate a mask. No two programs
write to one place, hence no atomics, and equal bits from equal inputs.

M queries and N keys of a tile, D head dim filled up to a power of two. Softmax works to base 2. `strides` are those of
batch, token and head; the last dimension is contiguous.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(num_tokens, num_heads, TILE: tl.constexpr):
    """Tile, sample and head of this program, all in the grid's first dimension: in others it takes 65535 at most."""
    num_tiles = tl.cdiv(num_tokens, TILE)
    sample_and_head = tl.program_id(0) // num_tiles
    sample, head = sample_and_head // num_heads, sample_and_head % num_heads
    return tl.program_id(0) % num_tiles, sample.to(tl.int64), head.to(tl.int64)


@triton.jit
def _load_tile(ptr, token_ids, stride_t, num_tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows [tokens, D] of one head; zeros past the last token and past the head dim."""
    dim = tl.arange(0, D)
    inside = (token_ids[:, None] < num_tokens) & (dim[None, :] < HEAD_DIM)
    tile = tl.load(ptr + token_ids[:, None].to(tl.int64) * stride_t + dim[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _store_tile(ptr, tile, token_ids, stride_t, num_tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    dim = tl.arange(0, D)
    inside = (token_ids[:, None] < num_tokens) & (dim[None, :] < HEAD_DIM)
    address = ptr + token_ids[:, None].to(tl.int64) * stride_t + dim[None, :]
    tl.store(address, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bounds(bounds_ptr, query, shift, num_queries, num_keys, CAUSAL: tl.constexpr, HAS_BOUNDS: tl.constexpr):
    """First key of each query and one past its last; `bounds_ptr` is that of the sample."""
    if HAS_BOUNDS:
        first = tl.load(bounds_ptr + 2 * query, mask=query < num_queries, other=0)
        end = tl.load(bounds_ptr + 2 * query + 1, mask=query < num_queries, other=0)
    else:
        first = query * 0
        end = query * 0 + num_keys
        if CAUSAL:
            end = tl.minimum(end, query + shift + 1)
    return first, end


@triton.jit
def _attend(
    acc,
    top,
    total,
    q,
    k_ptr,
    v_ptr,
    list_ptr,
    list_first,
    list_end,
    key_first,
    key_end,
    stride_kt,
    stride_vt,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Online softmax over entries list_first … list_end − 1 of a list of key blocks."""
    SPLITS: tl.constexpr = BLOCK // N
    for at in range(list_first * SPLITS, list_end * SPLITS):
        key = tl.load(list_ptr + at // SPLITS) * BLOCK + at % SPLITS * N + tl.arange(0, N)
        k = _load_tile(k_ptr, key, stride_kt, num_keys, HEAD_DIM, D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if MASKED:
            seen = (key[None, :] >= key_first[:, None]) & (key[None, :] < key_end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A query that has seen no key yet has a top of −∞, and −∞ − (−∞) would be NaN.
        level = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        p = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(p, 1)
        v = _load_tile(v_ptr, key, stride_vt, num_keys, HEAD_DIM, D, UPCAST)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    list_ptr,
    ranges_ptr,
    bounds_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_list,
    stride_rb,
    stride_rh,
    stride_bb,
    num_queries,
    num_keys,
    num_heads,
    group,
    shift,
    scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Output [B, S, H, D] and log-sum-exp [B, H, S], both contiguous; a program has M queries of a head."""
    tile, sample, head = _place(num_queries, num_heads, M)
    query = tile * M + tl.arange(0, M)
    q = _load_tile(q_ptr + sample * stride_qb + head * stride_qh, query, stride_qt, num_queries, HEAD_DIM, D, UPCAST)
    key_first, key_end = _bounds(
        bounds_ptr + sample * stride_bb, query, shift, num_queries, num_keys, CAUSAL, HAS_BOUNDS
    )
    k_ptr += sample * stride_kb + head // group * stride_kh
    v_ptr += sample * stride_vb + head // group * stride_vh
    list_ptr += head * stride_list
    ranges_ptr += sample * stride_rb + head * stride_rh + tile * M // BLOCK * 4
    first, full = tl.load(ranges_ptr), tl.load(ranges_ptr + 1)
    not_full, end = tl.load(ranges_ptr + 2), tl.load(ranges_ptr + 3)

    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    # fmt: off
    acc, top, total = _attend(acc, top, total, q, k_ptr, v_ptr, list_ptr, first, full, key_first, key_end, stride_kt,
                              stride_vt, num_keys, scale, HEAD_DIM, D, BLOCK, N, True, PRECISION, UPCAST)
    acc, top, total = _attend(acc, top, total, q, k_ptr, v_ptr, list_ptr, full, not_full, key_first, key_end, stride_kt,
                              stride_vt, num_keys, scale, HEAD_DIM, D, BLOCK, N, False, PRECISION, UPCAST)
    acc, top, total = _attend(acc, top, total, q, k_ptr, v_ptr, list_ptr, not_full, end, key_first, key_end, stride_kt,
                              stride_vt, num_keys, scale, HEAD_DIM, D, BLOCK, N, True, PRECISION, UPCAST)
    # fmt: on
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    out_ptr += (sample * num_queries * num_heads + head) * HEAD_DIM
    _store_tile(out_ptr, out, query, num_heads * HEAD_DIM, num_queries, HEAD_DIM, D)
    tl.store(lse_ptr + (sample * num_heads + head) * num_queries + query, lse, mask=query < num_queries)


@triton.jit
def delta_kernel(
    out_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    stride_ob,
    stride_ot,
    stride_oh,
    num_queries,
    num_heads,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Σ out · dout − dlse of each query, [B, H, S]; the strides are those of dout, all else is contiguous."""
    tile, sample, head = _place(num_queries, num_heads, M)
    query = tile * M + tl.arange(0, M)
    out_ptr += (sample * num_queries * num_heads + head) * HEAD_DIM
    out = _load_tile(out_ptr, query, num_heads * HEAD_DIM, num_queries, HEAD_DIM, D, True)
    dout_ptr += sample * stride_ob + head * stride_oh
    dout = _load_tile(dout_ptr, query, stride_ot, num_queries, HEAD_DIM, D, True)
    delta = tl.sum(out * dout, 1)
    at = (sample * num_heads + head) * num_queries + query
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=query < num_queries, other=0.0)
    tl.store(delta_ptr + at, delta, mask=query < num_queries)


@triton.jit
def _add_dq(
    dq,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    v_ptr,
    list_ptr,
    list_first,
    list_end,
    key_first,
    key_end,
    stride_kt,
    stride_vt,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add what entries list_first … list_end − 1 of a list of key blocks contribute to dq, but for the scale."""
    SPLITS: tl.constexpr = BLOCK // N
    for at in range(list_first * SPLITS, list_end * SPLITS):
        key = tl.load(list_ptr + at // SPLITS) * BLOCK + at % SPLITS * N + tl.arange(0, N)
        k = _load_tile(k_ptr, key, stride_kt, num_keys, HEAD_DIM, D, UPCAST)
        v = _load_tile(v_ptr, key, stride_vt, num_keys, HEAD_DIM, D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = (key[None, :] >= key_first[:, None]) & (key[None, :] < key_end[:, None])
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = p * (dp - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    list_ptr,
    ranges_ptr,
    bounds_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_list,
    stride_rb,
    stride_rh,
    stride_bb,
    num_queries,
    num_keys,
    num_heads,
    group,
    shift,
    scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of the queries, [B, S, H, D] contiguous; a program has M queries of a head and walks their row."""
    tile, sample, head = _place(num_queries, num_heads, M)
    query = tile * M + tl.arange(0, M)
    q = _load_tile(q_ptr + sample * stride_qb + head * stride_qh, query, stride_qt, num_queries, HEAD_DIM, D, UPCAST)
    dout_ptr += sample * stride_ob + head * stride_oh
    dout = _load_tile(dout_ptr, query, stride_ot, num_queries, HEAD_DIM, D, UPCAST)
    at = (sample * num_heads + head) * num_queries + query
    lse = tl.load(lse_ptr + at, mask=query < num_queries, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + at, mask=query < num_queries, other=0.0)
    key_first, key_end = _bounds(
        bounds_ptr + sample * stride_bb, query, shift, num_queries, num_keys, CAUSAL, HAS_BOUNDS
    )
    k_ptr += sample * stride_kb + head // group * stride_kh
    v_ptr += sample * stride_vb + head // group * stride_vh
    list_ptr += head * stride_list
    ranges_ptr += sample * stride_rb + head * stride_rh + tile * M // BLOCK * 4
    first, full = tl.load(ranges_ptr), tl.load(ranges_ptr + 1)
    not_full, end = tl.load(ranges_ptr + 2), tl.load(ranges_ptr + 3)

    dq = tl.zeros([M, D], tl.float32)
    # fmt: off
    dq = _add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, list_ptr, first, full, key_first, key_end, stride_kt, stride_vt,
                 num_keys, scale, HEAD_DIM, D, BLOCK, N, True, PRECISION, UPCAST)
    dq = _add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, list_ptr, full, not_full, key_first, key_end, stride_kt,
                 stride_vt, num_keys, scale, HEAD_DIM, D, BLOCK, N, False, PRECISION, UPCAST)
    dq = _add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, list_ptr, not_full, end, key_first, key_end, stride_kt,
                 stride_vt, num_keys, scale, HEAD_DIM, D, BLOCK, N, True, PRECISION, UPCAST)
    # fmt: on
    dq_ptr += (sample * num_queries * num_heads + head) * HEAD_DIM
    _store_tile(dq_ptr, dq * scale, query, num_heads * HEAD_DIM, num_queries, HEAD_DIM, D)


@triton.jit
def _add_dk_dv(
    dk,
    dv,
    k,
    v,
    key,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    bounds_ptr,
    list_ptr,
    list_first,
    list_end,
    stride_qt,
    stride_ot,
    num_queries,
    num_keys,
    shift,
    scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add what entries list_first … list_end − 1 of a list of query blocks contribute to dv, and, unscaled, to dk."""
    SPLITS: tl.constexpr = BLOCK // M
    for at in range(list_first * SPLITS, list_end * SPLITS):
        query = tl.load(list_ptr + at // SPLITS) * BLOCK + at % SPLITS * M + tl.arange(0, M)
        q = _load_tile(q_ptr, query, stride_qt, num_queries, HEAD_DIM, D, UPCAST)
        dout = _load_tile(dout_ptr, query, stride_ot, num_queries, HEAD_DIM, D, UPCAST)
        # Past the last query the probability is 2^−∞ = 0: full blocks need no mask for it.
        lse = tl.load(lse_ptr + query, mask=query < num_queries, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + query, mask=query < num_queries, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.exp2(scores - lse[None, :])
        if MASKED:
            key_first, key_end = _bounds(bounds_ptr, query, shift, num_queries, num_keys, CAUSAL, HAS_BOUNDS)
            seen = (key[:, None] >= key_first[None, :]) & (key[:, None] < key_end[None, :])
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dscores = p * (dp - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dk_dv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    list_ptr,
    ranges_ptr,
    bounds_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_list,
    stride_rb,
    stride_rh,
    stride_bb,
    num_queries,
    num_keys,
    num_kv_heads,
    group,
    shift,
    scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of keys and values, [B, T, K, D] contiguous; a program has N keys of a head.

    It walks their column for each of the `group` query heads that read them.
    """
    tile, sample, kv_head = _place(num_keys, num_kv_heads, N)
    key = tile * N + tl.arange(0, N)
    k = _load_tile(k_ptr + sample * stride_kb + kv_head * stride_kh, key, stride_kt, num_keys, HEAD_DIM, D, UPCAST)
    v = _load_tile(v_ptr + sample * stride_vb + kv_head * stride_vh, key, stride_vt, num_keys, HEAD_DIM, D, UPCAST)
    bounds_ptr += sample * stride_bb

    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        q_of = q_ptr + sample * stride_qb + head * stride_qh
        dout_of = dout_ptr + sample * stride_ob + head * stride_oh
        row = (sample * num_kv_heads * group + head) * num_queries
        lse_of, delta_of, list_of = lse_ptr + row, delta_ptr + row, list_ptr + head * stride_list
        ranges_of = ranges_ptr + sample * stride_rb + head * stride_rh + tile * N // BLOCK * 4
        first, full = tl.load(ranges_of), tl.load(ranges_of + 1)
        not_full, end = tl.load(ranges_of + 2), tl.load(ranges_of + 3)
        # fmt: off
        dk, dv = _add_dk_dv(dk, dv, k, v, key, q_of, dout_of, lse_of, delta_of, bounds_ptr, list_of, first, full,
                            stride_qt, stride_ot, num_queries, num_keys, shift, scale,
                            HEAD_DIM, D, BLOCK, M, CAUSAL, HAS_BOUNDS, True, PRECISION, UPCAST)
        dk, dv = _add_dk_dv(dk, dv, k, v, key, q_of, dout_of, lse_of, delta_of, bounds_ptr, list_of, full, not_full,
                            stride_qt, stride_ot, num_queries, num_keys, shift, scale,
                            HEAD_DIM, D, BLOCK, M, CAUSAL, HAS_BOUNDS, False, PRECISION, UPCAST)
        dk, dv = _add_dk_dv(dk, dv, k, v, key, q_of, dout_of, lse_of, delta_of, bounds_ptr, list_of, not_full, end,
                            stride_qt, stride_ot, num_queries, num_keys, shift, scale,
                            HEAD_DIM, D, BLOCK, M, CAUSAL, HAS_BOUNDS, True, PRECISION, UPCAST)
        # fmt: on
    out = (sample * num_keys * num_kv_heads + kv_head) * HEAD_DIM
    _store_tile(dk_ptr + out, dk * scale, key, num_kv_heads * HEAD_DIM, num_keys, HEAD_DIM, D)
    _store_tile(dv_ptr + out, dv, key, num_kv_heads * HEAD_DIM, num_keys, HEAD_DIM, D)

"""Vector n:m on a GPU, compressed n:m for few tokens, and sparsifying to 2:4 in one pass, in Triton. Deterministic.

T tokens, N outputs in G groups of V, K inputs, P = K·n/m kept inputs of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain_kernels.current_device import on_its_device
from sparsetrain_kernels.nm_linear.dense import compress, expand
from sparsetrain_kernels.nm_linear.pattern import NMPattern
from sparsetrain_kernels.precision import of_triton_products

_TILE_T = 64
_TILE_P = 32


@on_its_device
def output(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    zeroed: bool,
) -> Tensor:
    """x Wᵀ + bias [T, N]."""
    y_TN = x_TK.new_empty(len(x_TK), len(weight))
    if y_TN.numel():
        tile_v = min(pattern.vector, 128)
        grid = (triton.cdiv(len(x_TK), _TILE_T), len(weight) // tile_v)
        _output_kernel[grid](
            x_TK,
            _values(weight, columns_GP, pattern, x_TK.shape[1]),
            bias_N,
            columns_GP,
            y_TN,
            *(len(x_TK), len(weight), x_TK.shape[1], columns_GP.shape[1]),
            V=pattern.vector,
            TILE_T=_TILE_T,
            TILE_V=tile_v,
            TILE_P=_TILE_P,
            **of_triton_products(x_TK),
        )
    return y_TN


@on_its_device
def input_gradient(
    dy_TN: Tensor,
    weight: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    num_inputs: int,
    zeroed: bool,
) -> Tensor:
    """dy W [T, K], summed over the groups in fp32."""
    total_TK = dy_TN.new_zeros(len(dy_TN), num_inputs, dtype=torch.float32)
    if total_TK.numel():
        num_kept = columns_GP.shape[1]
        tile_p = max(_TILE_P, triton.next_power_of_2(pattern.n))
        owned = tile_p // pattern.n * pattern.n
        grid = (triton.cdiv(len(dy_TN), _TILE_T), triton.cdiv(num_kept, owned))
        _input_gradient_kernel[grid](
            dy_TN,
            _values(weight, columns_GP, pattern, num_inputs),
            columns_GP,
            total_TK,
            *(len(dy_TN), dy_TN.shape[1], num_inputs, num_kept, len(columns_GP)),
            V=pattern.vector,
            TILE_T=_TILE_T,
            TILE_V=min(pattern.vector, 64),
            TILE_P=tile_p,
            OWNED=owned,
            **of_triton_products(dy_TN),
        )
    return total_TK.to(dy_TN.dtype)


@on_its_device
def weight_gradient(
    dy_TN: Tensor,
    x_TK: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    compressed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """dyᵀ x at the kept weights: compressed [N, P], or [N, K] with zeros elsewhere."""
    num_kept = columns_GP.shape[1]
    values_NP = x_TK.new_empty(dy_TN.shape[1], num_kept)
    if values_NP.numel():
        tile_v = min(pattern.vector, 64)
        grid = (dy_TN.shape[1] // tile_v, triton.cdiv(num_kept, _TILE_P))
        _weight_gradient_kernel[grid](
            dy_TN,
            x_TK,
            columns_GP,
            values_NP,
            *(len(x_TK), dy_TN.shape[1], x_TK.shape[1], num_kept),
            V=pattern.vector,
            TILE_T=_TILE_T,
            TILE_V=tile_v,
            TILE_P=_TILE_P,
            **of_triton_products(x_TK),
        )
    values_NP = values_NP.to(dtype)
    return values_NP if compressed else expand(values_NP, columns_GP, x_TK.shape[1], pattern.vector)


@on_its_device
def output_of_few(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    zeroed: bool,
) -> Tensor:
    """x Wᵀ + bias [T, N] of compressed values [N, P], each of which is read once for up to 8 tokens."""
    y_TN = x_TK.new_empty(len(x_TK), len(weight))
    if y_TN.numel():
        tile_n = 16
        tile_t = min(triton.next_power_of_2(len(x_TK)), 8)
        _few_tokens_kernel[(triton.cdiv(len(weight), tile_n), triton.cdiv(len(x_TK), tile_t))](
            x_TK,
            weight,
            bias_N,
            columns_GP,
            y_TN,
            *(len(x_TK), len(weight), x_TK.shape[1], columns_GP.shape[1]),
            TILE_T=tile_t,
            TILE_N=tile_n,
            TILE_P=64,
        )
    return y_TN


@on_its_device
def sparsify_2_4(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `sparsify.sparsify_2_4`: the weight is read once, mask, values and offsets are written once."""
    num_outputs, num_inputs = weight_NK.shape
    mask_NK = torch.empty_like(weight_NK, dtype=torch.bool)
    values_NP = weight_NK.new_empty(num_outputs, num_inputs // 2)
    offsets_NP = torch.empty_like(values_NP, dtype=torch.uint8)
    if weight_NK.numel():
        tile = 256
        num_fours = weight_NK.numel() // 4
        _sparsify_kernel[(triton.cdiv(num_fours, tile),)](
            weight_NK, mask_NK.view(torch.uint8), values_NP, offsets_NP, num_fours, TILE=tile
        )
    return mask_NK, values_NP, offsets_NP


def _values(weight: Tensor, columns_GP: Tensor, pattern: NMPattern, num_inputs: int) -> Tensor:
    return weight if weight.shape[1] != num_inputs else compress(weight, columns_GP, pattern.vector)


@triton.jit
def _output_kernel(
    x_ptr,
    values_ptr,
    bias_ptr,
    columns_ptr,
    y_ptr,
    T,
    N,
    K,
    P,
    V: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_P: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile [TILE_T, TILE_V] of y per program: gather kept inputs, multiply densely."""
    token = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    n = tl.program_id(1).to(tl.int64) * TILE_V + tl.arange(0, TILE_V)
    group = tl.program_id(1).to(tl.int64) * TILE_V // V
    total = tl.zeros((TILE_T, TILE_V), dtype=tl.float32)
    for first in range(0, P, TILE_P):
        place = first + tl.arange(0, TILE_P)
        k = tl.load(columns_ptr + group * P + place, mask=place < P, other=0)
        x = tl.load(
            x_ptr + token[:, None] * K + k[None, :], mask=(token < T)[:, None] & (place < P)[None, :], other=0.0
        )
        w = tl.load(values_ptr + n[None, :] * P + place[:, None], mask=(place < P)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    tl.store(y_ptr + token[:, None] * N + n[None, :], total.to(y_ptr.dtype.element_ty), mask=(token < T)[:, None])


@triton.jit
def _few_tokens_kernel(
    x_ptr,
    values_ptr,
    bias_ptr,
    columns_ptr,
    y_ptr,
    T,
    N,
    K,
    P,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """A tile [TILE_T, TILE_N] of y per program, whose outputs each gather inputs of their own; no tensor cores."""
    n = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    token = tl.program_id(1).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    total = tl.zeros((TILE_T, TILE_N), dtype=tl.float32)
    for first in range(0, P, TILE_P):
        place = first + tl.arange(0, TILE_P)
        kept = (n < N)[:, None] & (place < P)[None, :]
        k = tl.load(columns_ptr + n[:, None] * P + place[None, :], mask=kept, other=0)
        w = tl.load(values_ptr + n[:, None] * P + place[None, :], mask=kept, other=0.0)
        x = tl.load(x_ptr + token[:, None, None] * K + k[None], mask=(token < T)[:, None, None] & kept[None], other=0.0)
        total += tl.sum(x.to(tl.float32) * w.to(tl.float32)[None], axis=2)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    exists = (token < T)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + token[:, None] * N + n[None, :], total.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _input_gradient_kernel(
    dy_ptr,
    values_ptr,
    columns_ptr,
    total_ptr,
    T,
    N,
    K,
    P,
    G,
    V: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_P: tl.constexpr,
    OWNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The gradient of TILE_T tokens at the inputs of whole groups of m, which no other program adds to.

    Every list of kept inputs has equally many in each group of m, so OWNED places, a multiple of n, lie within the same
    inputs in all lists: a program adds one group of outputs after another to the same memory, in order.
    """
    token = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    inside = tl.arange(0, TILE_P)
    place = tl.program_id(1).to(tl.int64) * OWNED + inside
    owned = (inside < OWNED) & (place < P)
    exists = (token < T)[:, None]
    for group in range(G):
        total = tl.zeros((TILE_T, TILE_P), dtype=tl.float32)
        for first in range(0, V, TILE_V):
            n = (group * V + first + tl.arange(0, TILE_V)).to(tl.int64)
            dy = tl.load(dy_ptr + token[:, None] * N + n[None, :], mask=exists, other=0.0)
            w = tl.load(values_ptr + n[:, None] * P + place[None, :], mask=owned[None, :], other=0.0)
            if UPCAST:
                dy, w = dy.to(tl.float32), w.to(tl.float32)
            total = tl.dot(dy, w, total, input_precision=PRECISION)
        k = tl.load(columns_ptr + group * P + place, mask=owned, other=0)
        target = total_ptr + token[:, None] * K + k[None, :]
        writes = exists & owned[None, :]
        tl.store(target, tl.load(target, mask=writes, other=0.0) + total, mask=writes)
        tl.debug_barrier()  # another thread of this program may add the next group at the same place


@triton.jit
def _weight_gradient_kernel(
    dy_ptr,
    x_ptr,
    columns_ptr,
    values_ptr,
    T,
    N,
    K,
    P,
    V: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_P: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile [TILE_V, TILE_P] of the compressed gradient per program, summed over all tokens."""
    n = tl.program_id(0).to(tl.int64) * TILE_V + tl.arange(0, TILE_V)
    group = tl.program_id(0).to(tl.int64) * TILE_V // V
    place = tl.program_id(1).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    k = tl.load(columns_ptr + group * P + place, mask=place < P, other=0)
    total = tl.zeros((TILE_V, TILE_P), dtype=tl.float32)
    for first in range(0, T, TILE_T):
        token = (first + tl.arange(0, TILE_T)).to(tl.int64)
        dy = tl.load(dy_ptr + token[None, :] * N + n[:, None], mask=(token < T)[None, :], other=0.0)
        x = tl.load(
            x_ptr + token[:, None] * K + k[None, :], mask=(token < T)[:, None] & (place < P)[None, :], other=0.0
        )
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        total = tl.dot(dy, x, total, input_precision=PRECISION)
    tl.store(
        values_ptr + n[:, None] * P + place[None, :], total.to(values_ptr.dtype.element_ty), mask=(place < P)[None, :]
    )


@triton.jit
def _sparsify_kernel(w_ptr, mask_ptr, values_ptr, offsets_ptr, num_fours, TILE: tl.constexpr):
    """TILE groups of four: a tournament of magnitudes, ties to the lower index."""
    four = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = four < num_fours
    entry = four[:, None] * 4 + tl.arange(0, 4)[None, :]
    w = tl.load(w_ptr + entry, mask=exists[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(w, (TILE, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    ka, kb, kc, kd = _order(a), _order(b), _order(c), _order(d)
    ab, ac, ad = (ka >= kb).to(tl.int32), (ka >= kc).to(tl.int32), (ka >= kd).to(tl.int32)
    bc, bd, cd = (kb >= kc).to(tl.int32), (kb >= kd).to(tl.int32), (kc >= kd).to(tl.int32)
    keep_a, keep_b = ab + ac + ad >= 2, 1 - ab + bc + bd >= 2
    keep_c, keep_d = 2 - ac - bc + cd >= 2, 3 - ad - bd - cd >= 2
    kept = tl.reshape(tl.join(tl.join(keep_a, keep_c), tl.join(keep_b, keep_d)), (TILE, 4))
    tl.store(mask_ptr + entry, kept.to(tl.uint8), mask=exists[:, None])
    first_value, first_offset = tl.where(keep_a, a, tl.where(keep_b, b, c)), tl.where(keep_a, 0, tl.where(keep_b, 1, 2))
    last_value, last_offset = tl.where(keep_d, d, tl.where(keep_c, c, b)), tl.where(keep_d, 3, tl.where(keep_c, 2, 1))
    pair = four[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(values_ptr + pair, tl.join(first_value, last_value), mask=exists[:, None])
    tl.store(offsets_ptr + pair, tl.join(first_offset, last_offset).to(tl.uint8), mask=exists[:, None])


@triton.jit
def _order(w):
    """Integers in the order of magnitudes, NaN last."""
    return w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF

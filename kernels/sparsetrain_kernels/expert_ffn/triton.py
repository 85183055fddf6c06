"""Experts on a GPU in Triton: all of them in one launch a product, without a wait for the host. Deterministic.

Shapes: R rows, E experts, T tokens, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

import os
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.current_device import on_its_device
from sparsetrain_kernels.expert_ffn import triton_kernels as kernels

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Stacks(NamedTuple):
    """Weights of all experts, or their gradients; contiguous."""

    w_in_EHD: Tensor
    w_out_EDF: Tensor
    b_in_EH: Tensor | None
    b_out_ED: Tensor | None


@on_its_device
def forward(
    x: Tensor, token_R: Tensor | None, ends_E: Tensor, num_rows: int, stacks: Stacks, activation: str
) -> tuple[Tensor, Tensor]:
    """Apply the experts.

    Args:
        x: Tokens [T, D], or rows [R, D] where there is no `token_R`; contiguous.
        token_R: int64, the token of each row; it is gathered while the first product reads it.
        ends_E: int32, one past each expert's last row.
        num_rows: R.
        stacks: Weights in the dtype of x; biases in any.
        activation: swiglu or gelu.

    Returns:
        y_RD: Outputs, in the dtype of x.
        h_RH: Hidden activations before their nonlinearity.
    """
    num_experts, in_dim, dim = stacks.w_in_EHD.shape
    hidden_dim = stacks.w_out_EDF.shape[2]
    h_RH, a_RF, y_RD = (x.new_empty(num_rows, size) for size in (in_dim, hidden_dim, dim))
    if num_rows == 0:
        return y_RD, h_RH
    tiles = _tiles(x, num_rows, num_experts)
    kernels.hidden_kernel[_programs(num_rows, num_experts, hidden_dim, tiles)](
        x,
        token_R,
        stacks.w_in_EHD,
        stacks.b_in_EH,
        h_RH,
        a_RF,
        ends_E,
        num_experts,
        dim,
        hidden_dim,
        GATED=activation == "swiglu",
        **tiles,
        **_precision(x),
    )
    return grouped_product(a_RF, stacks.w_out_EDF.mT, ends_E, stacks.b_out_ED), h_RH


@on_its_device
def backward(
    dy_RD: Tensor,
    x: Tensor,
    token_R: Tensor | None,
    h_RH: Tensor,
    ends_E: Tensor,
    stacks: Stacks,
    activation: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Stacks | None]:
    """The gradient by rows [R, D], and those by the weights in `dtype`, which are left out if it is None.

    Args:
        dy_RD: In the dtype of x; contiguous.
        x: As in `forward`, as are `token_R`, `ends_E`, `stacks` and the activation.
        token_R: See `forward`.
        h_RH: What `forward` returned.
        ends_E: See `forward`.
        stacks: See `forward`.
        activation: See `forward`.
        dtype: Of the gradients by weights.
    """
    num_rows, dim = dy_RD.shape
    num_experts, hidden_dim = len(ends_E), stacks.w_out_EDF.shape[2]
    a_RF, dh_RH = x.new_empty(num_rows, hidden_dim), torch.empty_like(h_RH)
    if num_rows > 0:
        tiles = _tiles(x, num_rows, num_experts)
        kernels.hidden_gradient_kernel[_programs(num_rows, num_experts, hidden_dim, tiles)](
            dy_RD,
            stacks.w_out_EDF,
            h_RH,
            a_RF,
            dh_RH,
            ends_E,
            num_experts,
            dim,
            hidden_dim,
            GATED=activation == "swiglu",
            **tiles,
            **_precision(x),
        )
    dx_RD = grouped_product(dh_RH, stacks.w_in_EHD, ends_E, None)
    if dtype is None:
        return dx_RD, None
    has_bias = stacks.b_in_EH is not None
    dw_in, db_in = grouped_outer_product(dh_RH, x, token_R, ends_E, dtype, sums=has_bias)
    dw_out, db_out = grouped_outer_product(dy_RD, a_RF, None, ends_E, dtype, sums=has_bias)
    return dx_RD, Stacks(dw_in, dw_out, db_in, db_out)


@on_its_device
def grouped_product(a_RK: Tensor, w_EKN: Tensor, ends_E: Tensor, bias_EN: Tensor | None) -> Tensor:
    """a w[e] + bias[e] for the rows of each expert; weights of any strides. [R, N] in the dtype of a."""
    (num_rows, size), num_outputs = a_RK.shape, w_EKN.shape[2]
    out_RN = a_RK.new_empty(num_rows, num_outputs)
    if out_RN.numel() == 0:
        return out_RN
    tiles = _tiles(a_RK, num_rows, len(w_EKN))
    kernels.product_kernel[_programs(num_rows, len(w_EKN), num_outputs, tiles)](
        a_RK,
        w_EKN,
        bias_EN,
        out_RN,
        ends_E,
        len(w_EKN),
        size,
        num_outputs,
        *w_EKN.stride(),
        **tiles,
        **_precision(a_RK),
    )
    return out_RN


@on_its_device
def grouped_outer_product(
    left_RN: Tensor, right: Tensor, token_R: Tensor | None, ends_E: Tensor, dtype: torch.dtype, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """leftᵀ right[token] over the rows of each expert [E, N, K], and with `sums` the sums of left over them [E, N]."""
    num_experts, num_left, num_right = len(ends_E), left_RN.shape[1], right.shape[1]
    out_ENK = left_RN.new_empty(num_experts, num_left, num_right, dtype=dtype)
    sums_EN = left_RN.new_empty(num_experts, num_left, dtype=dtype) if sums else None
    tiles = _outer_tiles(left_RN)
    programs = triton.cdiv(num_left, tiles["BLOCK_N"]), triton.cdiv(num_right, tiles["BLOCK_K"]), num_experts
    kernels.weight_gradient_kernel[programs](
        left_RN,
        right,
        token_R,
        out_ENK,
        sums_EN,
        ends_E,
        num_left,
        num_right,
        **tiles,
        **_precision(left_RN),
    )
    return out_ENK, sums_EN


def _tiles(a: Tensor, num_rows: int, num_experts: int) -> dict[str, int]:
    """Sizes of tiles: few rows for experts that have few, by the mean, as the counts are not known here."""
    mean = num_rows // num_experts
    rows = 16 if mean <= 16 else 64 if mean <= 256 or _is_wide(a) else 128
    # A gated tile holds two sums: 128 x 64 of each are what a program's registers hold.
    options = {"BLOCK_N": 64, "BLOCK_K": 32 if _is_wide(a) else 64, "num_warps": 8 if rows == 128 else 4}
    return {"BLOCK_M": rows, **options, "num_stages": 3, "E_PADDED": triton.next_power_of_2(max(num_experts, 2))}


def _outer_tiles(a: Tensor) -> dict[str, int]:
    """Sizes of tiles of weight gradients, and of the slices of rows that they are summed over."""
    sizes = (
        {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}
        if _is_wide(a)
        else {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8}
    )
    return {"BLOCK_M": 32, **sizes, "num_stages": 3}


def _programs(num_rows: int, num_experts: int, num_outputs: int, tiles: dict[str, int]) -> tuple[int, int]:
    """Enough for the rows however they spread: each expert may have one tile that is not full."""
    most = triton.cdiv(num_rows, tiles["BLOCK_M"]) + min(num_experts, num_rows)
    return triton.cdiv(num_outputs, tiles["BLOCK_N"]), most


def _is_wide(a: Tensor) -> bool:
    return a.dtype == torch.float32


def _precision(a: Tensor) -> dict[str, object]:
    """How products are computed: as torch would, and in fp32 under the interpreter, which multiplies bf16 wrongly."""
    tf32 = a.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": _INTERPRETED}

"""Experts on a GPU in Triton: all of them in one launch a product, without a wait for the host. Deterministic.

Shapes: R rows, E experts, T tokens, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.current_device import on_its_device
from sparsetrain_kernels.expert_ffn import triton_kernels as kernels
from sparsetrain_kernels.expert_ffn.matrices import Experts, Matrices
from sparsetrain_kernels.precision import of_triton_products


@on_its_device
def forward(
    x: Tensor, token_R: Tensor | None, ends_E: Tensor, num_rows: int, experts: Experts, activation: str
) -> tuple[Tensor, Tensor]:
    """Apply the experts.

    Args:
        x: Tokens [T, D], or rows [R, D] where there is no `token_R`; contiguous.
        token_R: int64, the token of each row; it is gathered while the first product reads it.
        ends_E: int32, one past each expert's last row.
        num_rows: R.
        experts: Weights in the dtype of x; biases in any.
        activation: swiglu or gelu.

    Returns:
        y_RD: Outputs, in the dtype of x.
        h_RH: Hidden activations before their nonlinearity.
    """
    num_experts, in_dim = len(ends_E), experts.w_in.base.shape[-2]
    dim, hidden_dim = experts.w_out.base.shape[-2:]
    h_RH, a_RF = x.new_empty(num_rows, in_dim), x.new_empty(num_rows, hidden_dim)
    if num_rows == 0:
        return x.new_empty(0, dim), h_RH
    tiles = _tiles(x, num_rows, num_experts)
    kernels.hidden_kernel[_programs(num_rows, num_experts, hidden_dim, tiles)](
        x,
        token_R,
        *_pointers(experts.w_in),
        *_pointers(experts.b_in),
        h_RH,
        a_RF,
        ends_E,
        num_experts,
        dim,
        hidden_dim,
        GATED=activation == "swiglu",
        UNIT=experts.w_in.unit,
        **tiles,
        **of_triton_products(x),
    )
    return grouped_product(a_RF, experts.w_out.mT, ends_E, experts.b_out), h_RH


@on_its_device
def backward(
    dy_RD: Tensor,
    x: Tensor,
    token_R: Tensor | None,
    h_RH: Tensor,
    ends_E: Tensor,
    experts: Experts,
    activation: str,
    gradients: Experts | None,
    *,
    add: bool,
) -> Tensor:
    """The gradient by rows [R, D]; those by the weights are written to `gradients`, or added to what is there.

    Args:
        dy_RD: In the dtype of x; contiguous.
        x: As in `forward`, as are `token_R`, `ends_E`, `experts` and the activation.
        token_R: See `forward`.
        h_RH: What `forward` returned.
        ends_E: See `forward`.
        experts: See `forward`.
        activation: See `forward`.
        gradients: In any float dtype; None if they are not wanted.
        add: Whether to add.
    """
    num_rows, dim = dy_RD.shape
    num_experts, hidden_dim = len(ends_E), experts.w_out.base.shape[-1]
    a_RF, dh_RH = x.new_empty(num_rows, hidden_dim), torch.empty_like(h_RH)
    if num_rows > 0:
        tiles = _tiles(x, num_rows, num_experts)
        kernels.hidden_gradient_kernel[_programs(num_rows, num_experts, hidden_dim, tiles)](
            dy_RD,
            *_pointers(experts.w_out),
            h_RH,
            a_RF,
            dh_RH,
            ends_E,
            num_experts,
            dim,
            hidden_dim,
            GATED=activation == "swiglu",
            UNIT=experts.w_out.unit,
            **tiles,
            **of_triton_products(x),
        )
    if gradients is not None:
        grouped_outer_product(dh_RH, x, token_R, ends_E, gradients.w_in, gradients.b_in, add=add)
        grouped_outer_product(dy_RD, a_RF, None, ends_E, gradients.w_out, gradients.b_out, add=add)
    return grouped_product(dh_RH, experts.w_in, ends_E, None)


@on_its_device
def grouped_product(a_RK: Tensor, w: Matrices, ends_E: Tensor, bias: Matrices | None) -> Tensor:
    """a w[e] + bias[e] for the rows of each expert; w [K, N] of each, of any strides. [R, N] in the dtype of a."""
    (num_rows, size), num_outputs, num_experts = a_RK.shape, w.base.shape[-1], len(ends_E)
    out_RN = a_RK.new_empty(num_rows, num_outputs)
    if out_RN.numel() == 0:
        return out_RN
    tiles = _tiles(a_RK, num_rows, num_experts)
    kernels.product_kernel[_programs(num_rows, num_experts, num_outputs, tiles)](
        a_RK,
        *_pointers(w),
        *_pointers(bias),
        out_RN,
        ends_E,
        num_experts,
        size,
        num_outputs,
        w.base.stride(0) if w.place_E is None else 0,
        *w.base.stride()[-2:],
        UNIT=w.unit,
        **tiles,
        **of_triton_products(a_RK),
    )
    return out_RN


@on_its_device
def grouped_outer_product(
    left_RN: Tensor,
    right: Tensor,
    token_R: Tensor | None,
    ends_E: Tensor,
    out: Matrices,
    sums: Matrices | None,
    *,
    add: bool,
) -> None:
    """Write leftᵀ right[token] over the rows of each expert to `out`, and the sums of left over them to `sums`.

    Args:
        left_RN: Contiguous.
        right: [R, K], or without a row for each where `token_R` says which is each row's; in the dtype of left.
        token_R: int64, or None.
        ends_E: One past each expert's last row.
        out: [N, K] of each, in any float dtype; contiguous.
        sums: [N] of each, likewise.
        add: Add to what is there. Otherwise experts without rows get zeros.
    """
    num_left, num_right = left_RN.shape[1], right.shape[1]
    tiles = _outer_tiles(left_RN)
    programs = triton.cdiv(num_left, tiles["BLOCK_N"]), triton.cdiv(num_right, tiles["BLOCK_K"]), len(ends_E)
    kernels.weight_gradient_kernel[programs](
        left_RN,
        right,
        token_R,
        *_pointers(out),
        *_pointers(sums),
        ends_E,
        num_left,
        num_right,
        ADD=add,
        UNIT=out.unit,
        **tiles,
        **of_triton_products(left_RN),
    )


def _pointers(matrices: Matrices | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if matrices is None else (matrices.base, matrices.place_E)


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

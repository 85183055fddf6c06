"""The forward and backward pass of experts one after the other, without autograd.

For CPUs, and for callers that own the backward pass and hold an expert's weights in tensors of their own.

Shapes: R rows, P rows filled up to whole tiles, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows,
then up rows), F for GELU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.blocks import Biases, Scratch, Weights, backward_block, blocks, forward_block
from sparsetrain_kernels.expert_ffn.rounding import num_rounded_rows, whole_tiles
from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.precision import as_written


def expert_ffn_forward(
    x_RD: Tensor,
    counts: Sequence[int],
    w_in: Sequence[Tensor],
    w_out: Sequence[Tensor],
    b_in: Biases,
    b_out: Biases,
    activation: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply expert e to the e-th counts[e] rows.

    Args:
        x_RD: Rows sorted by expert.
        counts: Rows of each expert; they add up to R. Zeros are allowed.
        w_in: [H, D] of each expert, in the dtype of x.
        w_out: [D, F] of each, in the dtype of x.
        b_in: [H] of each, or None.
        b_out: [D] of each, or None.
        activation: swiglu or gelu (in the tanh form).

    Returns:
        y_RD: In the dtype of x.
        saved: What the backward pass needs besides.
    """
    y_RD, h_PH = forward_of_rows(x_RD, counts, Weights(w_in, w_out, b_in, b_out), activation)
    return y_RD, (h_PH,)


def expert_ffn_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    saved: tuple[Tensor, ...],
    counts: Sequence[int],
    w_in: Sequence[Tensor],
    w_out: Sequence[Tensor],
    b_in: Biases,
    b_out: Biases,
    activation: str,
    dw_in: Sequence[Tensor],
    dw_out: Sequence[Tensor],
    db_in: Biases,
    db_out: Biases,
) -> Tensor:
    """The gradient by x; those by weights and biases are added to the given tensors, of any float dtype.

    Args:
        dy_RD: Any float dtype and strides.
        x_RD: As in the forward pass, as are `counts`, weights, biases and the activation.
        saved: What the forward pass returned.
        dw_in: [H, D] of each expert.
        dw_out: [D, F] of each.
        db_in: [H] of each, or None where there are no biases.
        db_out: [D] of each, or None.

    Returns:
        dx_RD: In the dtype of x.
    """
    weights, gradients = Weights(w_in, w_out, b_in, b_out), Weights(dw_in, dw_out, db_in, db_out)
    (h_PH,) = saved
    return backward_of_rows(dy_RD, x_RD, h_PH, counts, weights, activation, gradients, add=True)


def forward_of_rows(x_RD: Tensor, counts: Sequence[int], weights: Weights, activation: str) -> tuple[Tensor, Tensor]:
    """The experts' outputs, and hidden activations [P, H] before their nonlinearity."""
    num_rows, dim = x_RD.shape
    most = num_rounded_rows(num_rows, len(counts), x_RD.dtype, x_RD.device)
    tiles = whole_tiles(counts, num_rows, x_RD.dtype, x_RD.device)
    x_PD = tiles.spread(x_RD)
    h_PH, y_PD = new_result(x_RD, most, weights.in_dim), new_result(x_RD, len(x_PD), dim)
    h_PH[len(x_PD) :].zero_()  # unused, but equal calls shall have equal results
    parts = blocks(tiles.counts, len(x_PD), weights.in_dim * x_RD.itemsize)
    scratch = Scratch(x_RD, parts)
    with torch.no_grad(), as_written(x_RD.device):
        for block in parts:
            rows = block.rows
            forward_block(block, x_PD[rows], weights, activation, scratch, h_PH[rows], y_PD[rows])
    return tiles.collect(y_PD), h_PH


def backward_of_rows(
    dy_RD: Tensor,
    x_RD: Tensor,
    h_PH: Tensor,
    counts: Sequence[int],
    weights: Weights,
    activation: str,
    gradients: Weights | None,
    *,
    add: bool,
) -> Tensor:
    """The gradient by x; those by weights are added to `gradients`, or written there, or not computed if it is None.

    Where they are written, those of experts without rows stay as they are.
    """
    tiles = whole_tiles(counts, len(x_RD), x_RD.dtype, x_RD.device)
    x_PD, dy_PD = tiles.spread(x_RD), tiles.spread_with_zeros(dy_RD.to(x_RD.dtype)).contiguous()
    dx_PD = new_result(x_RD, *x_PD.shape)
    parts = blocks(tiles.counts, len(x_PD), weights.in_dim * x_RD.itemsize)
    scratch = Scratch(x_RD, parts)
    with torch.no_grad(), as_written(x_RD.device):
        for block in parts:
            dy, x, h, dx = (t[block.rows] for t in (dy_PD, x_PD, h_PH, dx_PD))
            adds = add or not block.is_first
            backward_block(block, dy, x, h, weights, activation, scratch, gradients, adds, dx)
    return tiles.collect(dx_PD)

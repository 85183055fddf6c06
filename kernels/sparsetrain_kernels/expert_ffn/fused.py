"""Gather, experts and weighted sum in one pass over blocks of rows, on a CPU: no copy of all rows is ever made.

Shapes: T tokens, R rows, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.blocks import Scratch, Weights, backward_block, blocks, forward_block
from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.permute.reference import combine
from sparsetrain_kernels.precision import as_written


def moe_forward(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts: Sequence[int],
    weights: Weights,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over a token's rows of weight · expert(x).

    Returns:
        y_TD: The sum, in the dtype of x.
        h_RH: Hidden activations before their nonlinearity, for the backward pass.
        y_RD: Outputs of the experts, likewise.
    """
    num_rows, dim = len(token_R), x_TD.shape[1]
    h_RH, y_RD = new_result(x_TD, num_rows, weights.in_dim), new_result(x_TD, num_rows, dim)
    parts = blocks(counts, len(h_RH), weights.in_dim * x_TD.itemsize)
    scratch = Scratch(x_TD, parts)
    with as_written(x_TD.device):
        for block in parts:
            x = torch.index_select(x_TD, 0, token_R[block.rows], out=scratch.take("x", block, dim))
            forward_block(block, x, weights, activation, scratch, h_RH[block.rows], y_RD[block.rows])
        return combine(y_RD, weight_R, token_R, len(x_TD)), h_RH, y_RD


def moe_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_RH: Tensor,
    y_RD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts: Sequence[int],
    weights: Weights,
    activation: str,
    gradients: Weights | None,
) -> tuple[Tensor, Tensor]:
    """The gradients by x and weight; those by the experts' weights are written to `gradients`, where it is given.

    Experts without rows are left out: their gradients stay as they are.
    """
    dim = x_TD.shape[1]
    dx_RD, dweight_R = new_result(x_TD, *y_RD.shape), torch.empty_like(weight_R)
    parts = blocks(counts, len(h_RH), weights.in_dim * x_TD.itemsize)
    scratch = Scratch(x_TD, parts)
    with as_written(x_TD.device):
        for block in parts:
            rows, token = block.rows, token_R[block.rows]
            x, dy = (
                torch.index_select(source, 0, token, out=scratch.take(name, block, dim))
                for name, source in (("x", x_TD), ("dy", dy_TD))
            )
            torch.sum(dy * y_RD[rows], 1, dtype=weight_R.dtype, out=dweight_R[rows])
            dy.mul_(weight_R[rows].to(dy.dtype).unsqueeze(1))
            backward_block(
                block, dy, x, h_RH[rows], weights, activation, scratch, gradients, not block.is_first, dx_RD[rows]
            )
        return combine(dx_RD, None, token_R, len(x_TD)), dweight_R

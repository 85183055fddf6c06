"""Gather, experts and weighted sum in one pass over blocks of rows, on a CPU: no copy of all rows is ever made.

Shapes: T tokens, R rows, P rows rounded up, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up
rows), F for GELU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.blocks import Scratch, Weights, backward_block, blocks, forward_block
from sparsetrain_kernels.expert_ffn.rounding import num_rounded_rows, whole_tiles
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
        h_PH: Hidden activations before their nonlinearity, for the backward pass.
        y_PD: Outputs of the experts, likewise.
    """
    dim, most = x_TD.shape[1], num_rounded_rows(len(token_R), len(counts), x_TD.dtype, x_TD.device)
    h_PH, y_PD = new_result(x_TD, most, weights.in_dim), new_result(x_TD, most, dim)
    tiles = whole_tiles(counts, len(token_R), x_TD.dtype, x_TD.device)
    token_P, weight_P = tiles.spread(token_R), tiles.spread_with_zeros(weight_R)
    for kept in (h_PH, y_PD):
        kept[len(token_P) :].zero_()  # unused, but equal calls shall have equal results
    parts = blocks(tiles.counts, len(token_P), weights.in_dim * x_TD.itemsize)
    scratch = Scratch(x_TD, parts)
    with as_written(x_TD.device):
        for block in parts:
            x = torch.index_select(x_TD, 0, token_P[block.rows], out=scratch.take("x", block, dim))
            forward_block(block, x, weights, activation, scratch, h_PH[block.rows], y_PD[block.rows])
        return combine(y_PD[: len(token_P)], weight_P, token_P, len(x_TD)), h_PH, y_PD


def moe_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_PH: Tensor,
    y_PD: Tensor,
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
    tiles = whole_tiles(counts, len(token_R), x_TD.dtype, x_TD.device)
    token_P, weight_P = tiles.spread(token_R), tiles.spread_with_zeros(weight_R)
    dx_PD, dweight_P = new_result(x_TD, len(token_P), dim), torch.empty_like(weight_P)
    parts = blocks(tiles.counts, len(token_P), weights.in_dim * x_TD.itemsize)
    scratch = Scratch(x_TD, parts)
    with as_written(x_TD.device):
        for block in parts:
            rows, token = block.rows, token_P[block.rows]
            x, dy = (
                torch.index_select(source, 0, token, out=scratch.take(name, block, dim))
                for name, source in (("x", x_TD), ("dy", dy_TD))
            )
            torch.sum(dy * y_PD[rows], 1, dtype=weight_P.dtype, out=dweight_P[rows])
            dy.mul_(weight_P[rows].to(dy.dtype).unsqueeze(1))
            backward_block(
                block, dy, x, h_PH[rows], weights, activation, scratch, gradients, not block.is_first, dx_PD[rows]
            )
        return combine(dx_PD, None, token_P, len(x_TD)), tiles.collect(dweight_P)

"""The forward and backward pass of experts one after the other, in torch's own products, without autograd.

Shapes: R rows, P rows filled up to whole tiles, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows,
then up rows), F for GELU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.blocks import Scratch, Weights, backward_block, blocks, forward_block
from sparsetrain_kernels.expert_ffn.rounding import num_rounded_rows, whole_tiles
from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.precision import as_written


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

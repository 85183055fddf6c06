"""The three products on whole weights: what every other implementation is held against."""

import torch
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.layout import BlockLists, Grid, by_block, unpack_index
from sparsetrain_kernels.tokens_last import linear


def output(
    x_TK: Tensor, weight: Tensor, bias_N: Tensor | None, index: Tensor, grid: Grid, zeroed: bool, tokens_last: bool
) -> Tensor:
    """x Wᵀ + bias [T, N]."""
    weight_NK = whole_weight(weight.to(x_TK.dtype), index, grid, zeroed)
    return linear(x_TK, weight_NK, bias_N, tokens_last)


def input_gradient(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: Grid, zeroed: bool, tokens_last: bool) -> Tensor:
    """dy W [T, K]."""
    weight_NK = whole_weight(weight.to(dy_TN.dtype), index, grid, zeroed)
    return linear(dy_TN, weight_NK.T, None, tokens_last)


def weight_gradient(dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: Grid, packed: bool, dtype: torch.dtype) -> Tensor:
    """The living blocks of dyᵀ x, packed or in a dense tensor of zeros."""
    every = (dy_TN.T @ x_TK).to(dtype)
    lists = unpack_index(index, grid)
    if packed:
        return by_block(every, grid)[lists.places()]
    return _living_only(every, lists, grid)


def whole_weight(weight: Tensor, index: Tensor, grid: Grid, zeroed: bool) -> Tensor:
    """The weight [N, K] with zeros in dead blocks, which `zeroed` says are there already."""
    lists = unpack_index(index, grid)
    if weight.ndim == 3:
        whole = weight.new_zeros(grid.shape)
        by_block(whole, grid)[lists.places()] = weight
        return whole
    return weight if zeroed else _living_only(weight, lists, grid)


def _living_only(whole: Tensor, lists: BlockLists, grid: Grid) -> Tensor:
    alive_RC = whole.new_zeros(grid[:2], dtype=torch.bool)
    alive_RC[lists.places()] = True
    return torch.where(alive_RC[:, :, None, None], by_block(whole, grid), 0).transpose(1, 2).reshape(grid.shape)

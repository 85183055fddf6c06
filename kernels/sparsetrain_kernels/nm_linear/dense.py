"""The three products on whole weights: what every other implementation is held against."""

import torch
from torch import Tensor

from sparsetrain_kernels.nm_linear.pattern import NMPattern
from sparsetrain_kernels.tokens_last import linear


def output(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    pattern: NMPattern,
    zeroed: bool,
    tokens_last: bool,
) -> Tensor:
    """x Wᵀ + bias [T, N]."""
    weight_NK = whole_weight(weight.to(x_TK.dtype), mask_GK, columns_GP, pattern, x_TK.shape[1], zeroed)
    return linear(x_TK, weight_NK, bias_N, tokens_last)


def input_gradient(
    dy_TN: Tensor,
    weight: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    pattern: NMPattern,
    num_inputs: int,
    zeroed: bool,
    tokens_last: bool,
) -> Tensor:
    """dy W [T, K]."""
    weight_NK = whole_weight(weight.to(dy_TN.dtype), mask_GK, columns_GP, pattern, num_inputs, zeroed)
    return linear(dy_TN, weight_NK.T, None, tokens_last)


def weight_gradient(
    dy_TN: Tensor,
    x_TK: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    pattern: NMPattern,
    compressed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """dyᵀ x at the kept weights: compressed [N, P], or [N, K] with zeros elsewhere."""
    every = (dy_TN.T @ x_TK).to(dtype)
    if compressed:
        assert columns_GP is not None
        return compress(every, columns_GP, pattern.vector)
    assert mask_GK is not None
    return masked(every, mask_GK, pattern.vector)


def whole_weight(
    weight: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    pattern: NMPattern,
    num_inputs: int,
    zeroed: bool,
) -> Tensor:
    """The weight [N, K] with zeros where nothing is kept, which `zeroed` says are there already."""
    if mask_GK is None:
        assert columns_GP is not None
        return expand(weight, columns_GP, num_inputs, pattern.vector)
    return weight if zeroed else masked(weight, mask_GK, pattern.vector)


def masked(whole: Tensor, mask_GK: Tensor, vector: int) -> Tensor:
    """A whole weight with zeros where nothing is kept."""
    by_group = whole.view(len(mask_GK), vector, mask_GK.shape[1])
    return torch.where(mask_GK[:, None], by_group, 0).view(whole.shape)


def compress(whole: Tensor, columns_GP: Tensor, vector: int) -> Tensor:
    """The kept weights [N, P] of a whole one."""
    by_group = whole.view(len(columns_GP), vector, whole.shape[1])
    columns = columns_GP.long()[:, None].expand(-1, vector, -1)
    return by_group.gather(2, columns).view(len(whole), columns_GP.shape[1])


def expand(values_NP: Tensor, columns_GP: Tensor, num_inputs: int, vector: int) -> Tensor:
    """The whole weight [N, K] of compressed values."""
    whole = values_NP.new_zeros(len(values_NP), num_inputs)
    columns = columns_GP.long()[:, None].expand(-1, vector, -1)
    whole.view(len(columns_GP), vector, num_inputs).scatter_(2, columns, values_NP.view(columns.shape))
    return whole

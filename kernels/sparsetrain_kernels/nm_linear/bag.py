"""Compressed n:m for few tokens on a CPU: outputs are weighted sums of rows of xᵀ.

Time goes with the bytes of values and indices instead of those of the whole weight.
"""

import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.nm_linear.pattern import NMPattern


def output(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor,
    pattern: NMPattern,
    zeroed: bool,
) -> Tensor:
    """x Wᵀ + bias [T, N] of compressed values [N, P] whose outputs each keep inputs of their own."""
    y_NT = F.embedding_bag(columns_GP, x_TK.T.contiguous(), per_sample_weights=weight, mode="sum")
    return y_NT.T.contiguous() if bias_N is None else (y_NT + bias_N[:, None]).T.contiguous()

"""The oracle: the block-sparse linear layer in plain torch, on the expanded weight."""

import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.layout import WeightBlocks


def block_sparse_linear(x: Tensor, weight: Tensor, layout: WeightBlocks, bias: Tensor | None = None) -> Tensor:
    """As the operator of the same name; autograd's gradient of a dense weight is 0 in dead blocks."""
    return F.linear(x, layout.unpack(layout.pack(weight) if weight.ndim == 2 else weight), bias)

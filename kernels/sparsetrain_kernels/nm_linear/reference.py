"""The oracle: the n:m linear layer in plain torch, on the masked weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.nm_linear.selection import NMSelection


def nm_linear(
    x: Tensor, weight: Tensor, selection: NMSelection, bias: Tensor | None = None, *, dense_gradient: bool = False
) -> Tensor:
    """As the operator of the same name, differentiable by autograd."""
    if weight.shape[1] != selection.shape[1]:
        return F.linear(x, selection.expand(weight), bias)
    masked = torch.where(selection.mask(), weight, 0)
    if dense_gradient:
        masked = weight + (masked - weight).detach()
    return F.linear(x, masked, bias)

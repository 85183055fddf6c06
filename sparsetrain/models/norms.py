"""Normalisation layers, whose outputs are already in the dtype that the next matrix product wants.

Shapes: D model dim; ... any leading dims.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from sparsetrain_kernels.precision import compute_dtype
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (arXiv 1910.07467, eq. 4).

    Args:
        dim: Size of the last dimension, D.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D] in the dtype of x; the result has the autocast dtype where autocast is on."""
        if x.is_cpu and not torch.compiler.is_compiling():
            y: Tensor = _CpuRMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        else:
            y = self._fused(x)
        return y.to(compute_dtype(x))

    def _fused(self, x: Tensor) -> Tensor:
        apex = None if torch.compiler.is_compiling() or not x.is_cuda else find_rms_norm()
        if apex is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        y: Tensor = apex(x, self.weight, self.weight.shape, self.eps)
        return y


@cache
def find_rms_norm() -> Callable[..., Tensor] | None:
    """apex's RMSNorm(x, weight, normalised shape, eps) for CUDA, with a backward pass of its own; None without apex."""
    try:
        import_module("fused_layer_norm_cuda")  # its kernels, which it imports at the first call only
        found: Callable[..., Tensor] = import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    except (ImportError, AttributeError):  # not installed, or another package of that name
        return None
    return found


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with the output in the autocast dtype where autocast is on."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D] in the dtype of x."""
        return super().forward(x).to(compute_dtype(x))


class _CpuRMSNorm(torch.autograd.Function):
    """RMSNorm with a backward pass through torch's fused LayerNorm kernel; torch 2.13 has none for RMSNorm on CPUs.

    With mean 0 that kernel returns r·(g − mean(g) − x̂·mean(g·x̂)), where g = dy·weight, r = 1/rms and x̂ = r·x.
    RMSNorm's gradient is the same without −mean(g), which a matrix-vector product gives back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y: Tensor
        y, inverse_rms = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        dy = dy.contiguous()
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False)
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, weight.shape, torch.zeros_like(inverse_rms), inverse_rms, weight, None, needs
        )
        if needs[0]:
            dx.addcmul_((dy @ (weight / weight.numel())).unsqueeze(-1), inverse_rms)
        return dx, dweight, None

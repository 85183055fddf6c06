"""Rotary position embeddings (RoPE, arXiv 2104.09864), in the half-split layout of Llama checkpoints.

Shapes: B batch, T tokens, H heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotation_table(num_tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · theta^(−2i/D), each float32 [T, D/2].

    Computed at each forward pass (it costs next to nothing) so that a model built on the meta device has no buffer to
    fill; in float32 always, as published checkpoints were trained with.
    """
    table: tuple[Tensor, Tensor] = _rotation_table(num_tokens, head_dim, theta, device)
    return table


# An operator of its own, because torch.compile would fuse it into each rotation and compute cosines for every sample,
# head and layer: measured a sixth of a compiled step.
@torch.library.custom_op("sparsetrain::rotation_table", mutates_args=())
def _rotation_table(num_tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angle = torch.outer(torch.arange(num_tokens, dtype=torch.float32, device=device), 1.0 / theta**exponent)
    return angle.cos(), angle.sin()


@_rotation_table.register_fake
def _(num_tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (num_tokens, head_dim // 2)
    return torch.empty(shape, device=device), torch.empty(shape, device=device)


def rotate(x_BTHD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its position's angle; same shape and dtype, computed in float32 or better."""
    rotated: Tensor = _Rotate.apply(x_BTHD, *table)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing but the table is kept for it."""

    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BTHD, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(dy_BTHD, cos, -sin), None, None


def _turn(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x₁ cos − x₂ sin, x₂ cos + x₁ sin) of the halves x₁, x₂ of the last dimension."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x = x_BTHD.to(torch.promote_types(x_BTHD.dtype, cos.dtype))
    y = x * torch.cat((cos, cos), dim=-1)
    half = cos.shape[-1]
    y[..., :half].addcmul_(x[..., half:], sin, value=-1)
    y[..., half:].addcmul_(x[..., :half], sin)
    return y.to(x_BTHD.dtype)

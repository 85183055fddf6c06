"""Rotary position embeddings (RoPE, arXiv 2104.09864), in the half-split layout of Llama checkpoints.

Shapes: B batch, T tokens, H heads, D head dim.
"""

import torch
from torch import Tensor


def rotation_table(num_tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · theta^(−2i/D), each float32 [T, D/2].

    Computed at each forward pass (it costs next to nothing) so that a model built on the meta device has no buffer to
    fill; in float32 always, as published checkpoints were trained with.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angle = torch.outer(torch.arange(num_tokens, dtype=torch.float32, device=device), 1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def rotate(x_BTHD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its position's angle; same shape and dtype, computed in float32 or better."""
    cos, sin = (values.unsqueeze(1) for values in table)
    first, second = x_BTHD.to(torch.promote_types(x_BTHD.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHD.dtype)

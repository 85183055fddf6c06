"""Experts in plain torch, differentiable: what the other implementations are held against.

Shapes: T tokens, R rows, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def expert_ffn(
    x_RD: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """swiglu: w_out (silu(gate x) · up x). gelu: w_out gelu(w_in x), in the tanh form. [R, D]."""
    y_RD = []
    for expert, x in enumerate(torch.split(x_RD, counts_E.tolist())):
        h = F.linear(x, w_in_EHD[expert], None if b_in is None else b_in[expert])
        if activation == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            a = F.silu(gate) * up
        else:
            a = F.gelu(h, approximate="tanh")
        y_RD.append(F.linear(a, w_out_EDF[expert], None if b_out is None else b_out[expert]))
    return torch.cat(y_RD)


def moe_ffn(
    x_TD: Tensor, token_R: Tensor, weight_R: Tensor, counts_E: Tensor, *weights: Tensor, **options: object
) -> Tensor:
    """Σ over a token's rows of weight · expert(x); the other arguments as of `expert_ffn`. [T, D]."""
    y_RD = expert_ffn(x_TD[token_R], counts_E, *weights, **options)  # type: ignore[arg-type]
    return torch.zeros_like(x_TD).index_add(0, token_R, y_RD * weight_R.to(y_RD.dtype).unsqueeze(1))

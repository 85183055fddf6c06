"""The forward and backward pass of experts one after the other, without autograd: matrix products into given memory.

For CPUs, and for callers that own the backward pass and hold an expert's weights in tensors of their own.

Shapes: R rows, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from sparsetrain_kernels.precision import as_written

Activation = Literal["swiglu", "gelu"]
Biases = Sequence[Tensor] | None


def expert_ffn_forward(
    x_RD: Tensor,
    counts: Sequence[int],
    w_in: Sequence[Tensor],
    w_out: Sequence[Tensor],
    b_in: Biases,
    b_out: Biases,
    activation: Activation,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply expert e to the e-th counts[e] rows.

    Args:
        x_RD: Rows sorted by expert.
        counts: Rows of each expert; they add up to R. Zeros are allowed.
        w_in: [H, D] of each expert, in the dtype of x.
        w_out: [D, F] of each, in the dtype of x.
        b_in: [H] of each, or None.
        b_out: [D] of each, or None.
        activation: swiglu or gelu (in the tanh form).

    Returns:
        y_RD: In the dtype of x.
        saved: What the backward pass needs besides.
    """
    hidden_dim = w_in[0].shape[0]
    h_RH = x_RD.new_empty(len(x_RD), hidden_dim)
    y_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
    with torch.no_grad(), as_written(x_RD.device):
        for e, rows in _row_ranges(counts):
            _linear(x_RD[rows], w_in[e], None if b_in is None else b_in[e], h_RH[rows])
            a = _activate(h_RH[rows], activation)
            _linear(a, w_out[e], None if b_out is None else b_out[e], y_RD[rows])
    return y_RD, (h_RH,)


def expert_ffn_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    saved: tuple[Tensor, ...],
    counts: Sequence[int],
    w_in: Sequence[Tensor],
    w_out: Sequence[Tensor],
    b_in: Biases,
    b_out: Biases,
    activation: Activation,
    dw_in: Sequence[Tensor],
    dw_out: Sequence[Tensor],
    db_in: Biases,
    db_out: Biases,
) -> Tensor:
    """The gradient by x; those by weights and biases are added to the given tensors, of any float dtype.

    Args:
        dy_RD: Any strides.
        x_RD: As in the forward pass, as are `counts`, weights, biases and the activation.
        saved: What the forward pass returned.
        dw_in: [H, D] of each expert.
        dw_out: [D, F] of each.
        db_in: [H] of each, or None where there are no biases.
        db_out: [D] of each, or None.

    Returns:
        dx_RD: In the dtype of x.
    """
    (h_RH,) = saved
    dy_RD = dy_RD.to(x_RD.dtype).contiguous()
    dx_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
    with torch.no_grad(), as_written(x_RD.device):
        for e, rows in _row_ranges(counts):
            dy, x = dy_RD[rows], x_RD[rows]
            da = torch.mm(dy, w_out[e])
            a, dh = _activate_backward(da, h_RH[rows], activation)
            dw_out[e].add_(torch.mm(dy.mT, a))
            dw_in[e].add_(torch.mm(dh.mT, x))
            torch.mm(dh, w_in[e], out=dx_RD[rows])
            if db_in is not None and db_out is not None:
                db_in[e].add_(dh.sum(0))
                db_out[e].add_(dy.sum(0))
    return dx_RD


def _row_ranges(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    for expert, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        if count:
            yield expert, slice(end - count, end)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x weightᵀ + bias."""
    if bias is None:
        torch.mm(x, weight.mT, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.mT, out=out)


def _activate(h_RH: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu(h_RH, approximate="tanh")
    gate_RF, up_RF = h_RH.chunk(2, dim=1)
    return torch.ops.aten.silu(gate_RF).mul_(up_RF)


def _activate_backward(da_RF: Tensor, h_RH: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The activation again, and the gradient by what it was applied to."""
    if activation == "gelu":
        return _activate(h_RH, activation), torch.ops.aten.gelu_backward(da_RF, h_RH, approximate="tanh")
    gate_RF, up_RF = h_RH.chunk(2, dim=1)
    silu_RF = torch.ops.aten.silu(gate_RF)
    dup_RF = da_RF * silu_RF
    dgate_RF = torch.ops.aten.silu_backward(da_RF.mul_(up_RF), gate_RF)
    return silu_RF.mul_(up_RF), torch.cat([dgate_RF, dup_RF], dim=1)

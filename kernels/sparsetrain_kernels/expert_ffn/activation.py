"""The activation of a block of rows, forward and backward, into given memory.

Shapes: R rows of a block, F hidden dim, H = 2F for SwiGLU (gate columns, then up columns), F for GELU.
"""

from typing import Literal

import torch
from torch import Tensor

Activation = Literal["swiglu", "gelu"]

_aten = torch.ops.aten


def check_activation(activation: str) -> None:
    """Raise ValueError where there is no such activation."""
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"activation = {activation}: expected swiglu or gelu")


def activate(h_RH: Tensor, activation: str, out_RF: Tensor) -> Tensor:
    """silu(gate) · up, or gelu(h) in its tanh form, written to `out_RF` and returned."""
    if activation == "gelu":
        _aten.gelu.out(h_RH, approximate="tanh", out=out_RF)
        return out_RF
    gate_RF, up_RF = h_RH.chunk(2, dim=1)
    _aten.silu.out(gate_RF, out=out_RF)
    return out_RF.mul_(up_RF)


def activate_backward(da_RF: Tensor, h_RH: Tensor, activation: str, a_RF: Tensor, dh_RH: Tensor) -> None:
    """Write the activation again to `a_RF`, and the gradient by `h_RH` to `dh_RH`; `da_RF` is overwritten."""
    if activation == "gelu":
        _aten.gelu.out(h_RH, approximate="tanh", out=a_RF)
        _aten.gelu_backward.grad_input(da_RF, h_RH, approximate="tanh", grad_input=dh_RH)
        return
    gate_RF, up_RF = h_RH.chunk(2, dim=1)
    dgate_RF, dup_RF = dh_RH.chunk(2, dim=1)
    silu_RF = _aten.silu.out(gate_RF, out=a_RF)
    torch.mul(da_RF, silu_RF, out=dup_RF)
    a_RF.mul_(up_RF)
    _aten.silu_backward.grad_input(da_RF.mul_(up_RF), gate_RF, grad_input=dgate_RF)

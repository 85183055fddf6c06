"""The forward and backward pass on weights in lists, without autograd: for callers that own the backward pass.

Shapes: R rows, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.activation import check_activation
from sparsetrain_kernels.expert_ffn.blocks import Biases, Weights
from sparsetrain_kernels.expert_ffn.by_expert import backward_of_rows, forward_of_rows
from sparsetrain_kernels.expert_ffn.matrices import Experts, listed, to_device
from sparsetrain_kernels.expert_ffn.rounding import check_counts
from sparsetrain_kernels.row_backend import runs_triton


def expert_ffn_forward(
    x_RD: Tensor,
    counts: Sequence[int],
    w_in: Sequence[Tensor],
    w_out: Sequence[Tensor],
    b_in: Biases,
    b_out: Biases,
    activation: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply expert e to the e-th counts[e] rows; on a GPU in one launch a product, wherever the weights lie.

    Args:
        x_RD: Rows sorted by expert.
        counts: Rows of each expert; they add up to R. Zeros are allowed.
        w_in: [H, D] of each expert, in the dtype of x; on a GPU contiguous, as are the rest.
        w_out: [D, F] of each, in the dtype of x.
        b_in: [H] of each, or None.
        b_out: [D] of each, or None.
        activation: swiglu or gelu (in the tanh form).

    Returns:
        y_RD: In the dtype of x.
        saved: What the backward pass needs besides.

    Raises:
        ValueError: The counts do not add up to R or are not those of all experts, there is no such activation, or on a
            GPU weights that do not match each other.
    """
    _check(counts, activation, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
    if not runs_triton(x_RD):
        y_RD, h_PH = forward_of_rows(x_RD, counts, Weights(w_in, w_out, b_in, b_out), activation)
        return y_RD, (h_PH,)
    check_counts(counts, len(x_RD))
    _check_shapes(x_RD, activation, w_in, w_out, b_in, b_out)
    with torch.no_grad():
        experts = Experts(*listed(w_in, w_out, b_in, b_out))  # type: ignore[arg-type]
        y_RD, h_RH = _triton().forward(x_RD.contiguous(), None, _ends(counts, x_RD), len(x_RD), experts, activation)
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
    activation: str,
    dw_in: Sequence[Tensor],
    dw_out: Sequence[Tensor],
    db_in: Biases,
    db_out: Biases,
) -> Tensor:
    """The gradient by x; those by weights and biases are added to the given tensors, of any float dtype.

    Args:
        dy_RD: Any float dtype and strides.
        x_RD: As in the forward pass, as are `counts`, weights, biases and the activation.
        saved: What the forward pass returned.
        dw_in: [H, D] of each expert.
        dw_out: [D, F] of each.
        db_in: [H] of each, or None where there are no biases.
        db_out: [D] of each, or None.

    Returns:
        dx_RD: In the dtype of x.

    Raises:
        ValueError: As in the forward pass, of weights and gradients.
    """
    (h,) = saved
    gradients_of = {"dw_in": dw_in, "dw_out": dw_out, "db_in": db_in, "db_out": db_out}
    _check(counts, activation, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out, **gradients_of)
    if not runs_triton(x_RD):
        weights, gradients = Weights(w_in, w_out, b_in, b_out), Weights(dw_in, dw_out, db_in, db_out)
        return backward_of_rows(dy_RD, x_RD, h, counts, weights, activation, gradients, add=True)
    check_counts(counts, len(x_RD))
    _check_shapes(x_RD, activation, w_in, w_out, b_in, b_out)
    _check_shapes(x_RD, activation, dw_in, dw_out, db_in, db_out)
    with torch.no_grad():
        places = listed(w_in, w_out, b_in, b_out, dw_in, dw_out, db_in, db_out)
        experts, into = Experts(*places[:4]), Experts(*places[4:])  # type: ignore[arg-type]
        dy_RD, x_RD = dy_RD.to(x_RD.dtype).contiguous(), x_RD.contiguous()
        dx_RD: Tensor = _triton().backward(
            dy_RD, x_RD, None, h, _ends(counts, x_RD), experts, activation, into, add=True
        )
    return dx_RD


def _check(counts: Sequence[int], activation: str, **lists: Sequence[Tensor] | None) -> None:
    """Raise ValueError unless there is such an activation, and an entry for every expert in each list that is there."""
    check_activation(activation)
    for name, tensors in lists.items():
        if tensors is not None and len(tensors) != len(counts):
            raise ValueError(
                f"{name} has {len(tensors)} entries for {len(counts)} counts: expected one for every expert"
            )


def _check_shapes(
    x_RD: Tensor, activation: str, w_in: Sequence[Tensor], w_out: Sequence[Tensor], b_in: Biases, b_out: Biases
) -> None:
    """Raise ValueError unless the first of each, weights or gradients of them, are of an expert's shapes."""
    dim, hidden_dim = x_RD.shape[1], w_out[0].shape[-1]
    in_dim = hidden_dim * (2 if activation == "swiglu" else 1)
    shapes = {
        "w_in": (w_in, (in_dim, dim)),
        "w_out": (w_out, (dim, hidden_dim)),
        "b_in": (b_in, (in_dim,)),
        "b_out": (b_out, (dim,)),
    }
    for name, (tensors, shape) in shapes.items():
        if tensors is not None and tuple(tensors[0].shape) != shape:
            raise ValueError(
                f"{name}, or its gradient, is of shape {tuple(tensors[0].shape)}: for x of {dim} columns, w_out of "
                f"{hidden_dim} and activation={activation!r} it must be {shape}"
            )


def _ends(counts: Sequence[int], x_RD: Tensor) -> Tensor:
    """One past each expert's last row."""
    return to_device(list(accumulate(counts)), torch.int32, x_RD.device)


def _triton() -> Any:
    return import_module("sparsetrain_kernels.expert_ffn.triton")

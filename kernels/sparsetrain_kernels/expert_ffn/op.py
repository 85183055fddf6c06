"""`expert_ffn` and `moe_ffn` as operators of torch, with their gradients.

Shapes: T tokens, R rows, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up rows), F for GELU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.by_expert import Activation, Biases, expert_ffn_backward, expert_ffn_forward
from sparsetrain_kernels.permute import reference as rows
from sparsetrain_kernels.precision import compute_dtype


def expert_ffn(
    x_RD: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """Apply to each row the feed-forward network of its expert; differentiable in rows, weights and biases.

    swiglu: w_out (silu(gate x) · up x). gelu: w_out gelu(w_in x), in the tanh form. Products run in the autocast dtype
    where autocast is on, else in the dtype of x.

    Args:
        x_RD: Rows sorted by expert.
        counts_E: int64, rows of each expert; they add up to R. Zeros are allowed, and so is R = 0.
        w_in_EHD: Gate rows, then up rows, for swiglu.
        w_out_EDF: The second matrices.
        b_in: [E, H], or None.
        b_out: [E, D]; given if and only if `b_in` is.
        activation: swiglu or gelu.

    Returns:
        [R, D] in the dtype of the products.
    """
    dtype = compute_dtype(x_RD)
    weights = [None if w is None else w.to(dtype) for w in (w_in_EHD, w_out_EDF, b_in, b_out)]
    y_RD: Tensor = torch.ops.sparsetrain.expert_ffn(x_RD.to(dtype), counts_E, *weights, activation)[0]
    return y_RD


def moe_ffn(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """Σ over a token's rows of weight · expert(x): `permute`, `expert_ffn` and `unpermute` in one.

    Args:
        x_TD: Tokens.
        token_R: int64, the token of each row; rows sorted by expert.
        weight_R: Floats.
        counts_E: As `expert_ffn` takes it, and so the rest.
        w_in_EHD: See `expert_ffn`.
        w_out_EDF: See `expert_ffn`.
        b_in: See `expert_ffn`.
        b_out: See `expert_ffn`.
        activation: See `expert_ffn`.

    Returns:
        [T, D] in the dtype of the products; 0 for tokens that have no row.
    """
    dtype = compute_dtype(x_TD)
    weights = [None if w is None else w.to(dtype) for w in (w_in_EHD, w_out_EDF, b_in, b_out)]
    y_TD: Tensor = torch.ops.sparsetrain.moe_ffn(x_TD.to(dtype), token_R, weight_R, counts_E, *weights, activation)[0]
    return y_TD


@torch.library.custom_op("sparsetrain::expert_ffn", mutates_args=())
def _expert_ffn(
    x_RD: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    y_RD, (h_RH,) = expert_ffn_forward(
        x_RD.contiguous(),
        counts_E.tolist(),
        *_lists(w_in_EHD, w_out_EDF, b_in, b_out),
        activation,
    )
    return y_RD, h_RH


@_expert_ffn.register_fake
def _(x_RD: Tensor, counts_E: Tensor, w_in_EHD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), x_RD.new_empty(x_RD.shape[0], w_in_EHD.shape[1])


@torch.library.custom_op("sparsetrain::expert_ffn_backward", mutates_args=())
def _expert_ffn_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> list[Tensor]:
    weights = (w_in_EHD, w_out_EDF, b_in, b_out)
    dweights = [None if w is None else torch.zeros_like(w) for w in weights]
    dx_RD = expert_ffn_backward(
        dy_RD,
        x_RD,
        (h_RH,),
        counts_E.tolist(),
        *_lists(*weights),
        activation,
        *_lists(*dweights),
    )
    return [dx_RD, *(dw for dw in dweights if dw is not None)]


@_expert_ffn_backward.register_fake
def _(
    dy_RD: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    counts_E: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Any,
    b_out: Any,
    *rest: Any,
) -> list[Tensor]:
    return [torch.empty_like(w) for w in (x_RD, w_in, w_out, b_in, b_out) if w is not None]


def _save_for_expert_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_RD, counts_E, w_in, w_out, b_in, b_out, ctx.activation = inputs
    ctx.save_for_backward(x_RD, output[1], counts_E, w_in, w_out, b_in, b_out)
    ctx.set_materialize_grads(False)


def _differentiate_expert_ffn(ctx: Any, dy_RD: Tensor, _: None) -> tuple[Tensor | None, ...]:
    dx_RD, *dweights = torch.ops.sparsetrain.expert_ffn_backward(dy_RD, *ctx.saved_tensors, ctx.activation)
    return dx_RD, None, *dweights, *[None] * (5 - len(dweights))


_expert_ffn.register_autograd(_differentiate_expert_ffn, setup_context=_save_for_expert_ffn)


@torch.library.custom_op("sparsetrain::moe_ffn", mutates_args=())
def _moe_ffn(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_RD = rows.gather(x_TD.contiguous(), token_R)
    y_RD, (h_RH,) = expert_ffn_forward(
        x_RD,
        counts_E.tolist(),
        *_lists(w_in_EHD, w_out_EDF, b_in, b_out),
        activation,
    )
    return rows.combine(y_RD, weight_R, token_R, len(x_TD)), x_RD, h_RH, y_RD


@_moe_ffn.register_fake
def _(
    x_TD: Tensor, token_R: Tensor, weight_R: Tensor, counts_E: Tensor, w_in: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    num_rows, dim = token_R.shape[0], x_TD.shape[1]
    x_RD, h_RH, y_RD = (x_TD.new_empty(num_rows, size) for size in (dim, w_in.shape[1], dim))
    return x_TD.new_empty(x_TD.shape), x_RD, h_RH, y_RD


@torch.library.custom_op("sparsetrain::moe_ffn_backward", mutates_args=())
def _moe_ffn_backward(
    dy_TD: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    y_RD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> list[Tensor]:
    weights = (w_in_EHD, w_out_EDF, b_in, b_out)
    dweights = [None if w is None else torch.zeros_like(w) for w in weights]
    dy_RD, dweight_R = rows.combine_backward(dy_TD.contiguous(), y_RD, weight_R, token_R)
    dx_RD = expert_ffn_backward(
        dy_RD,
        x_RD,
        (h_RH,),
        counts_E.tolist(),
        *_lists(*weights),
        activation,
        *_lists(*dweights),
    )
    dx_TD = rows.combine(dx_RD, None, token_R, len(dy_TD))
    return [dx_TD, dweight_R, *(dw for dw in dweights if dw is not None)]


@_moe_ffn_backward.register_fake
def _(
    dy_TD: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    y_RD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    *rest: Any,
) -> list[Tensor]:
    return [
        torch.empty_like(dy_TD, memory_format=torch.contiguous_format),
        *(torch.empty_like(w) for w in (weight_R, *rest[:4]) if w is not None),
    ]


def _save_for_moe_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, token_R, weight_R, counts_E, *weights, ctx.activation = inputs
    ctx.save_for_backward(*output[1:], token_R, weight_R, counts_E, *weights)
    ctx.set_materialize_grads(False)


def _differentiate_moe_ffn(ctx: Any, dy_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dx_TD, dweight_R, *dweights = torch.ops.sparsetrain.moe_ffn_backward(dy_TD, *ctx.saved_tensors, ctx.activation)
    return dx_TD, None, dweight_R, None, *dweights, *[None] * (5 - len(dweights))


_moe_ffn.register_autograd(_differentiate_moe_ffn, setup_context=_save_for_moe_ffn)


def _lists(
    w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor], Biases, Biases]:
    """The tensors of each expert."""
    biases = [None if stack is None else stack.unbind() for stack in (b_in, b_out)]
    return w_in.unbind(), w_out.unbind(), biases[0], biases[1]

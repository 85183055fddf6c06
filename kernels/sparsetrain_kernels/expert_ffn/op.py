"""`expert_ffn` and `moe_ffn` as operators of torch, with their gradients.

Shapes: T tokens, R rows, P rows rounded up, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up
rows), F for GELU.
"""

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.activation import Activation, check_activation
from sparsetrain_kernels.expert_ffn.passes import rows_backward, rows_forward, tokens_backward, tokens_forward
from sparsetrain_kernels.expert_ffn.rounding import num_rounded_rows
from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.permute.op import check_tokens, check_weights
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
    where autocast is on, else in the dtype of x; gradients of weights have the dtype of the weights.

    Args:
        x_RD: Rows sorted by expert.
        counts_E: int64, rows of each expert; they add up to R. Zeros are allowed, and so is R = 0.
        w_in_EHD: The first matrices: for swiglu gate rows, then up rows.
        w_out_EDF: The second matrices.
        b_in: [E, H], or None.
        b_out: [E, D]; given if and only if `b_in` is.
        activation: swiglu or gelu.

    Returns:
        [R, D] in the dtype of the products.

    Raises:
        ValueError: Shapes that do not fit each other, or another activation.
    """
    _check(x_RD, counts_E, w_in_EHD, w_out_EDF, b_in, b_out, activation)
    x_RD = x_RD.to(compute_dtype(x_RD))
    y_RD: Tensor = torch.ops.sparsetrain.expert_ffn(x_RD, counts_E, w_in_EHD, w_out_EDF, b_in, b_out, activation)[0]
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
        weight_R: Floats, differentiable as well.
        counts_E: As `expert_ffn` takes it, and so the rest.
        w_in_EHD: See `expert_ffn`.
        w_out_EDF: See `expert_ffn`.
        b_in: See `expert_ffn`.
        b_out: See `expert_ffn`.
        activation: See `expert_ffn`.

    Returns:
        [T, D] in the dtype of the products; 0 for tokens that have no row.

    Raises:
        ValueError: Shapes that do not fit each other, or another activation.
    """
    _check(x_TD, counts_E, w_in_EHD, w_out_EDF, b_in, b_out, activation)
    check_tokens(token_R)
    check_weights(weight_R, num_rows=token_R.shape[0])
    x_TD = x_TD.to(compute_dtype(x_TD))
    y_TD: Tensor = torch.ops.sparsetrain.moe_ffn(
        x_TD, token_R, weight_R, counts_E, w_in_EHD, w_out_EDF, b_in, b_out, activation
    )[0]
    return y_TD


def _check(
    x: Tensor,
    counts_E: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> None:
    check_activation(activation)
    if w_out.dim() != 3:
        raise ValueError(f"w_out has shape {tuple(w_out.shape)}: expected [E, D, F], a matrix of each expert")
    num_experts, dim, hidden_dim = w_out.shape
    in_dim = 2 * hidden_dim if activation == "swiglu" else hidden_dim
    if (b_in is None) != (b_out is None):
        missing = "b_in" if b_in is None else "b_out"
        raise ValueError(f"{missing} = None, and the other is given: pass b_in and b_out, or neither")
    expected = {"counts_E": (num_experts,), "w_in": (num_experts, in_dim, dim), "x": (x.shape[0], dim)}
    found = {"counts_E": counts_E.shape, "w_in": w_in.shape, "x": x.shape}
    if b_in is not None and b_out is not None:
        expected |= {"b_in": (num_experts, in_dim), "b_out": (num_experts, dim)}
        found |= {"b_in": b_in.shape, "b_out": b_out.shape}
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{name} has shape {tuple(found[name])}: expected {shape}, for {activation} and w_out of shape "
                f"{tuple(w_out.shape)}"
            )


@torch.library.custom_op("sparsetrain::expert_ffn", mutates_args=())
def _expert_ffn(
    x_RD: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and what the backward pass wants: hidden activations, and the weights where they had to be cast."""
    w_in_C, w_out_C = _cast(w_in_EHD, x_RD.dtype), _cast(w_out_EDF, x_RD.dtype)
    stacks = _either(w_in_C, w_in_EHD), _either(w_out_C, w_out_EDF), b_in, b_out
    return *rows_forward(x_RD, counts_E, stacks, activation), w_in_C, w_out_C


@_expert_ffn.register_fake
def _(x_RD: Tensor, counts_E: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    num_rows = num_rounded_rows(x_RD.shape[0], w_in_EHD.shape[0], x_RD.dtype, x_RD.device)
    h_PH = x_RD.new_empty(num_rows, w_in_EHD.shape[1])
    return x_RD.new_empty(x_RD.shape), h_PH, _empty_cast(w_in_EHD, x_RD.dtype), _empty_cast(w_out_EDF, x_RD.dtype)


@torch.library.custom_op("sparsetrain::expert_ffn_backward", mutates_args=())
def _expert_ffn_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    h_PH: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients by x and by every weight that there is; the latter in `dtype`, or left out if it is None."""
    stacks = w_in_EHD, w_out_EDF, b_in, b_out
    return rows_backward(dy_RD, x_RD, h_PH, counts_E, stacks, activation, dtype)


@_expert_ffn_backward.register_fake
def _(dy_RD: Tensor, x_RD: Tensor, h_PH: Tensor, counts_E: Tensor, *rest: Any) -> list[Tensor]:
    return [x_RD.new_empty(x_RD.shape), *_empty_gradients(*rest)]


def _save_for_expert_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_RD, counts_E, w_in, w_out, b_in, b_out, ctx.activation = inputs
    _, h_PH, w_in_C, w_out_C = output
    ctx.dtype = w_in.dtype
    ctx.set_materialize_grads(False)  # what is kept for the backward pass has none
    ctx.save_for_backward(x_RD, h_PH, counts_E, _either(w_in_C, w_in), _either(w_out_C, w_out), b_in, b_out)


def _differentiate_expert_ffn(ctx: Any, dy_RD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dtype = ctx.dtype if any(ctx.needs_input_grad[2:6]) else None
    dx_RD, *dweights = torch.ops.sparsetrain.expert_ffn_backward(dy_RD, *ctx.saved_tensors, ctx.activation, dtype)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and what the backward pass wants: activations, and the weights where they had to be cast."""
    w_in_C, w_out_C = _cast(w_in_EHD, x_TD.dtype), _cast(w_out_EDF, x_TD.dtype)
    stacks = _either(w_in_C, w_in_EHD), _either(w_out_C, w_out_EDF), b_in, b_out
    return *tokens_forward(x_TD, token_R, weight_R, counts_E, stacks, activation), w_in_C, w_out_C


@_moe_ffn.register_fake
def _(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    num_rows = num_rounded_rows(token_R.shape[0], w_in_EHD.shape[0], x_TD.dtype, x_TD.device)
    h_PH, y_PD = (x_TD.new_empty(num_rows, dim) for dim in (w_in_EHD.shape[1], x_TD.shape[1]))
    casts = (_empty_cast(w, x_TD.dtype) for w in (w_in_EHD, w_out_EDF))
    return x_TD.new_empty(x_TD.shape), h_PH, y_PD, *casts


@torch.library.custom_op("sparsetrain::moe_ffn_backward", mutates_args=())
def _moe_ffn_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_PH: Tensor,
    y_PD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients by x, `weight_R` and every weight that there is; the last in `dtype`, or left out if it is None."""
    stacks = w_in_EHD, w_out_EDF, b_in, b_out
    return tokens_backward(dy_TD, x_TD, h_PH, y_PD, token_R, weight_R, counts_E, stacks, activation, dtype)


@_moe_ffn_backward.register_fake
def _(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_PH: Tensor,
    y_PD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    *rest: Any,
) -> list[Tensor]:
    return [x_TD.new_empty(x_TD.shape), torch.empty_like(weight_R), *_empty_gradients(*rest)]


def _save_for_moe_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, token_R, weight_R, counts_E, w_in, w_out, b_in, b_out, ctx.activation = inputs
    _, h_PH, y_PD, w_in_C, w_out_C = output
    ctx.dtype = w_in.dtype
    ctx.set_materialize_grads(False)  # what is kept for the backward pass has none
    weights = _either(w_in_C, w_in), _either(w_out_C, w_out), b_in, b_out
    ctx.save_for_backward(x_TD, h_PH, y_PD, token_R, weight_R, counts_E, *weights)


def _differentiate_moe_ffn(ctx: Any, dy_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dtype = ctx.dtype if any(ctx.needs_input_grad[4:8]) else None
    dx_TD, dweight_R, *dweights = torch.ops.sparsetrain.moe_ffn_backward(
        dy_TD, *ctx.saved_tensors, ctx.activation, dtype
    )
    return dx_TD, None, dweight_R, None, *dweights, *[None] * (5 - len(dweights))


_moe_ffn.register_autograd(_differentiate_moe_ffn, setup_context=_save_for_moe_ffn)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another dtype; an empty tensor where it is the same, as results must not share memory with it."""
    return (
        weight.new_empty(0) if weight.dtype == dtype else new_result(weight, *weight.shape, dtype=dtype).copy_(weight)
    )


def _empty_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(0) if weight.dtype == dtype else weight.new_empty(weight.shape, dtype=dtype)


def _either(cast: Tensor, weight: Tensor) -> Tensor:
    return cast if cast.dim() == weight.dim() else weight


def _empty_gradients(w_in: Tensor, w_out: Tensor, b_in: Any, b_out: Any, _: str, dtype: Any) -> list[Tensor]:
    return (
        []
        if dtype is None
        else [w.new_empty(w.shape, dtype=dtype) for w in (w_in, w_out, b_in, b_out) if w is not None]
    )

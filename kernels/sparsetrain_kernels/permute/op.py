"""`permute` and `unpermute` as operators of torch, with their gradients.

Shapes: T tokens, R rows, D model dim.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.permute import reference
from sparsetrain_kernels.row_backend import runs_triton


def permute(x_TD: Tensor, token_R: Tensor) -> Tensor:
    """Copy tokens to the rows that they have been assigned; differentiable, and deterministic.

    Args:
        x_TD: Floats, any strides.
        token_R: int64 in [0, T), the token of each row. A token may have any number of rows.

    Returns:
        [R, D] in the dtype of x.

    Raises:
        ValueError: Tensors of other shapes or dtypes.
    """
    check_matrix("x_TD", x_TD)
    check_tokens(token_R)
    x_RD: Tensor = torch.ops.sparsetrain.permute(x_TD, token_R)
    return x_RD


def unpermute(y_RD: Tensor, weight_R: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    """Add up each token's rows, multiplied by their weights; differentiable in both, and deterministic.

    Args:
        y_RD: Floats, any strides.
        weight_R: Floats.
        token_R: int64 in [0, T), the token of each row.
        num_tokens: T.

    Returns:
        [T, D] in the dtype of y; 0 for tokens that have no row.

    Raises:
        ValueError: Tensors of other shapes or dtypes.
    """
    check_matrix("y_RD", y_RD)
    check_tokens(token_R, num_rows=y_RD.shape[0])
    check_weights(weight_R, num_rows=y_RD.shape[0])
    y_TD: Tensor = torch.ops.sparsetrain.unpermute(y_RD, weight_R, token_R, num_tokens)
    return y_TD


def check_matrix(name: str, x: Tensor) -> None:
    """Raise ValueError unless it is a matrix of floats."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}: expected floats of two dimensions")


def check_tokens(token_R: Tensor, num_rows: int | None = None) -> None:
    """Raise ValueError unless it has one token for each row; how large they are is not looked at."""
    if token_R.dim() != 1 or token_R.dtype != torch.int64 or num_rows not in (None, token_R.shape[0]):
        expected = "one dimension" if num_rows is None else f"shape ({num_rows},)"
        raise ValueError(f"token_R is {token_R.dtype} of shape {tuple(token_R.shape)}: expected int64 of {expected}")


def check_weights(weight_R: Tensor, num_rows: int) -> None:
    """Raise ValueError unless it has one weight for each row."""
    if tuple(weight_R.shape) != (num_rows,) or not weight_R.is_floating_point():
        found = f"{weight_R.dtype} of shape {tuple(weight_R.shape)}"
        raise ValueError(f"weight_R is {found}: expected floats of shape ({num_rows},)")


def backend_of(x: Tensor) -> Any:
    """The module that has `gather`, `combine` and `combine_backward` for tensors like this."""
    return import_module("sparsetrain_kernels.permute.triton") if runs_triton(x) else reference


@torch.library.custom_op("sparsetrain::permute", mutates_args=())
def _permute(x_TD: Tensor, token_R: Tensor) -> Tensor:
    x_RD: Tensor = backend_of(x_TD).gather(x_TD.contiguous(), token_R.contiguous())
    return x_RD


@_permute.register_fake
def _(x_TD: Tensor, token_R: Tensor) -> Tensor:
    return x_TD.new_empty(token_R.shape[0], x_TD.shape[1])


@torch.library.custom_op("sparsetrain::permute_backward", mutates_args=())
def _permute_backward(dx_RD: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    dx_TD: Tensor = backend_of(dx_RD).combine(dx_RD.contiguous(), None, token_R.contiguous(), num_tokens)
    return dx_TD


@_permute_backward.register_fake
def _(dx_RD: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    return dx_RD.new_empty(num_tokens, dx_RD.shape[1])


@torch.library.custom_op("sparsetrain::unpermute", mutates_args=())
def _unpermute(y_RD: Tensor, weight_R: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    arguments = y_RD.contiguous(), weight_R.contiguous(), token_R.contiguous()
    y_TD: Tensor = backend_of(y_RD).combine(*arguments, num_tokens)
    return y_TD


@_unpermute.register_fake
def _(y_RD: Tensor, weight_R: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    return y_RD.new_empty(num_tokens, y_RD.shape[1])


@torch.library.custom_op("sparsetrain::unpermute_backward", mutates_args=())
def _unpermute_backward(dy_TD: Tensor, y_RD: Tensor, weight_R: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    arguments = (each.contiguous() for each in (dy_TD, y_RD, weight_R, token_R))
    dy_RD, dweight_R = backend_of(y_RD).combine_backward(*arguments)
    return dy_RD, dweight_R


@_unpermute_backward.register_fake
def _(dy_TD: Tensor, y_RD: Tensor, weight_R: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    return y_RD.new_empty(y_RD.shape), weight_R.new_empty(weight_R.shape)


def _save_for_permute(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x_TD, token_R = inputs
    ctx.save_for_backward(token_R)
    ctx.num_tokens = x_TD.shape[0]


def _differentiate_permute(ctx: Any, dx_RD: Tensor) -> tuple[Tensor | None, ...]:
    (token_R,) = ctx.saved_tensors
    return torch.ops.sparsetrain.permute_backward(dx_RD, token_R, ctx.num_tokens), None


def _save_for_unpermute(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    y_RD, weight_R, token_R, _ = inputs
    ctx.save_for_backward(y_RD, weight_R, token_R)


def _differentiate_unpermute(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    dy_RD, dweight_R = torch.ops.sparsetrain.unpermute_backward(dy_TD, *ctx.saved_tensors)
    return dy_RD, dweight_R, None, None


_permute.register_autograd(_differentiate_permute, setup_context=_save_for_permute)
_unpermute.register_autograd(_differentiate_unpermute, setup_context=_save_for_unpermute)

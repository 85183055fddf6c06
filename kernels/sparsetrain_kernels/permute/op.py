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
    """
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
    """
    y_TD: Tensor = torch.ops.sparsetrain.unpermute(y_RD, weight_R, token_R, num_tokens)
    return y_TD


def backend_of(x: Tensor) -> Any:
    """The module that has `gather`, `combine` and `combine_backward` for tensors like this."""
    return import_module("sparsetrain_kernels.permute.triton") if runs_triton(x) else reference


@torch.library.custom_op("sparsetrain::permute", mutates_args=())
def _permute(x_TD: Tensor, token_R: Tensor) -> Tensor:
    x_RD: Tensor = backend_of(x_TD).gather(x_TD.contiguous(), token_R)
    return x_RD


@_permute.register_fake
def _(x_TD: Tensor, token_R: Tensor) -> Tensor:
    return x_TD.new_empty(token_R.shape[0], x_TD.shape[1])


@torch.library.custom_op("sparsetrain::permute_backward", mutates_args=())
def _permute_backward(dx_RD: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    dx_TD: Tensor = backend_of(dx_RD).combine(dx_RD.contiguous(), None, token_R, num_tokens)
    return dx_TD


@_permute_backward.register_fake
def _(dx_RD: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    return dx_RD.new_empty(num_tokens, dx_RD.shape[1])


@torch.library.custom_op("sparsetrain::unpermute", mutates_args=())
def _unpermute(y_RD: Tensor, weight_R: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    y_TD: Tensor = backend_of(y_RD).combine(y_RD.contiguous(), weight_R, token_R, num_tokens)
    return y_TD


@_unpermute.register_fake
def _(y_RD: Tensor, weight_R: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    return y_RD.new_empty(num_tokens, y_RD.shape[1])


@torch.library.custom_op("sparsetrain::unpermute_backward", mutates_args=())
def _unpermute_backward(dy_TD: Tensor, y_RD: Tensor, weight_R: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    backend = backend_of(y_RD)
    dy_RD, dweight_R = backend.combine_backward(dy_TD.contiguous(), y_RD.contiguous(), weight_R, token_R)
    return dy_RD, dweight_R


@_unpermute_backward.register_fake
def _(dy_TD: Tensor, y_RD: Tensor, weight_R: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    return y_RD.new_empty(y_RD.shape), torch.empty_like(weight_R)


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

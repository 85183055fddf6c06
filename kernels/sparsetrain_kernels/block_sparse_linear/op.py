"""`block_sparse_linear`: a linear layer that computes only the living blocks of its weight, and both gradients."""

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.implementations import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT, variant_of
from sparsetrain_kernels.block_sparse_linear.layout import Grid, WeightBlocks
from sparsetrain_kernels.precision import compute_dtype
from sparsetrain_kernels.tokens_last import are_tokens_last, fake_tokens, plain_tokens, store_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def block_sparse_linear(
    x: Tensor,
    weight: Tensor,
    layout: WeightBlocks,
    bias: Tensor | None = None,
    *,
    zeroed: bool = False,
    dense_gradient: bool = False,
    tokens_last: bool = False,
) -> Tensor:
    """x Wᵀ + bias, where W is the weight with zeros outside the living blocks of `layout`.

    Which implementation computes it is the dispatcher's choice: see `sparsetrain_kernels.dispatch.explain`, operations
    block_sparse_linear.output, .input_gradient and .weight_gradient with sizes (tokens, outputs, inputs).

    Args:
        x: Inputs [..., K] in float32, bfloat16, float16 or float64; cast to autocast's dtype where that is on.
        weight: Dense [N, K] or packed [B, r, c], cast to the dtype of the computation. What a dense one holds in
            dead blocks is ignored.
        layout: The living blocks, on the device of x.
        bias: [N].
        zeroed: The caller knows that a dense weight is zero in its dead blocks, which spares the dense implementation
            a masking pass; a wrong promise gives wrong results.
        dense_gradient: Give a dense weight its whole gradient dyᵀ x, dead blocks included, as methods that regrow
            weights by gradient need; otherwise it is zero in dead blocks.
        tokens_last: Store the result in memory as [N, ...], its tokens along the rows. On a CPU slabs of features are
            copied whole so, and elementwise operations keep the order. x may be stored either way; its gradient is
            stored as it is.

    Returns:
        [..., N] in the dtype of the computation.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or a packed weight is asked for a dense gradient.
    """
    dtype = compute_dtype(x)
    _check(x, weight, layout, bias, dtype, dense_gradient)
    x_TK = x.to(dtype).reshape(-1, x.shape[-1])
    bias_N = None if bias is None else bias.to(dtype)
    if not x.is_cpu:
        weight = weight.to(dtype)  # once for all products; on a CPU the products cast what they read
    how = zeroed, dense_gradient, tokens_last
    y_TN: Tensor = _linear(x_TK, weight, bias_N, layout.index, list(layout.grid), *how)
    return y_TN.view(*x.shape[:-1], y_TN.shape[1])


def _check(
    x: Tensor, weight: Tensor, layout: WeightBlocks, bias: Tensor | None, dtype: torch.dtype, dense_gradient: bool
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"x is {dtype}: block_sparse_linear computes in {', '.join(map(str, DTYPES))}; cast it")
    if weight.ndim not in (2, 3):
        raise ValueError(
            f"weight is {list(weight.shape)}: must be dense [outputs, inputs] or packed [blocks, rows, columns]"
        )
    layout.check_weight(weight, packed=weight.ndim == 3)
    num_outputs, num_inputs = layout.grid.shape
    if x.ndim < 1 or x.shape[-1] != num_inputs:
        raise ValueError(f"x is {list(x.shape)}: its last dimension must be the layout's {num_inputs} inputs")
    if bias is not None and tuple(bias.shape) != (num_outputs,):
        raise ValueError(f"bias is {list(bias.shape)}: must be [{num_outputs}], the layout's outputs")
    if dense_gradient and weight.ndim == 3:
        raise ValueError(
            "dense_gradient=True: a packed weight holds no dead blocks to give gradients to; pass a dense one"
        )
    devices = {"x": x.device, "weight": weight.device, "layout": layout.index.device}
    if bias is not None:
        devices["bias"] = bias.device
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{places}: must be on one device; move with .to()")


@torch.library.custom_op("sparsetrain::block_sparse_linear", mutates_args=())
def _linear(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    index: Tensor,
    grid: list[int],
    zeroed: bool,
    dense_gradient: bool,
    tokens_last: bool,
) -> Tensor:
    problem = _problem(x_TK, index, grid, tokens_last or are_tokens_last(x_TK))
    bias_N = None if bias_N is None else bias_N.contiguous()
    arguments = plain_tokens(x_TK), weight.contiguous(), bias_N, index, Grid(*grid), zeroed, tokens_last
    return store_tokens(OUTPUT.run(x_TK, problem, *arguments), tokens_last)


@_linear.register_fake
def _(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    index: Tensor,
    grid: list[int],
    zeroed: bool,
    dense_gradient: bool,
    tokens_last: bool,
) -> Tensor:
    return fake_tokens(x_TK, x_TK.shape[0], grid[0] * grid[2], tokens_last)


@torch.library.custom_op("sparsetrain::block_sparse_linear_input_gradient", mutates_args=())
def _input_gradient(
    dy_TN: Tensor, weight: Tensor, index: Tensor, grid: list[int], zeroed: bool, tokens_last: bool
) -> Tensor:
    problem = _problem(dy_TN, index, grid, tokens_last or are_tokens_last(dy_TN))
    arguments = plain_tokens(dy_TN), weight.contiguous(), index, Grid(*grid), zeroed, tokens_last
    return store_tokens(INPUT_GRADIENT.run(dy_TN, problem, *arguments), tokens_last)


@_input_gradient.register_fake
def _(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: list[int], zeroed: bool, tokens_last: bool) -> Tensor:
    return fake_tokens(dy_TN, dy_TN.shape[0], grid[1] * grid[3], tokens_last)


@torch.library.custom_op("sparsetrain::block_sparse_linear_weight_gradient", mutates_args=())
def _weight_gradient(
    dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: list[int], packed: bool, dtype: torch.dtype
) -> Tensor:
    problem = _problem(x_TK, index, grid, are_tokens_last(x_TK) or are_tokens_last(dy_TN))
    arguments = plain_tokens(dy_TN), plain_tokens(x_TK), index, Grid(*grid), packed, dtype
    return WEIGHT_GRADIENT.run(x_TK, problem, *arguments)  # type: ignore[no-any-return]


@_weight_gradient.register_fake
def _(dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: list[int], packed: bool, dtype: torch.dtype) -> Tensor:
    if packed:
        return x_TK.new_empty((index.shape[0] - grid[0] - grid[1] - 2) // 3, grid[2], grid[3], dtype=dtype)
    return x_TK.new_empty(grid[0] * grid[2], grid[1] * grid[3], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight, _, index, ctx.grid, ctx.zeroed, ctx.dense_gradient, _ = inputs
    ctx.save_for_backward(x_TK, weight, index)


def _backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
    x_TK, weight, index = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx = dw = None
    if needs_x:
        dx = _input_gradient(dy_TN, weight, index, ctx.grid, ctx.zeroed, are_tokens_last(x_TK))
    if needs_weight and ctx.dense_gradient:
        dw = (dy_TN.T @ x_TK).to(weight.dtype)
    elif needs_weight:
        dw = _weight_gradient(dy_TN, x_TK, index, ctx.grid, weight.ndim == 3, weight.dtype)
    db = dy_TN.sum(0) if needs_bias else None
    return dx, dw, db, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_save)


def _problem(like_T: Tensor, index: Tensor, grid: list[int], tokens_last: bool) -> tuple[str, tuple[int, ...], float]:
    """Variant, sizes and density for the dispatcher."""
    num_rows, num_columns, block_rows, block_columns = grid
    num_blocks = (index.numel() - num_rows - num_columns - 2) // 3
    sizes = (like_T.shape[0], num_rows * block_rows, num_columns * block_columns)
    return (
        variant_of((block_rows, block_columns), tokens_last and like_T.is_cpu),
        sizes,
        num_blocks / (num_rows * num_columns),
    )

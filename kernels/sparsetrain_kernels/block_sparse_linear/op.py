"""`block_sparse_linear`: a linear layer that computes only the living blocks of its weight, and both gradients."""

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.block_sparse_linear.implementations import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT
from sparsetrain_kernels.block_sparse_linear.layout import Grid, WeightBlocks
from sparsetrain_kernels.precision import compute_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def block_sparse_linear(
    x: Tensor,
    weight: Tensor,
    layout: WeightBlocks,
    bias: Tensor | None = None,
    *,
    zeroed: bool = False,
    dense_gradient: bool = False,
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
    y_TN: Tensor = _linear(x_TK, weight, bias_N, layout.index, list(layout.grid), zeroed, dense_gradient)
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
) -> Tensor:
    problem = _problem(x_TK, index, grid)
    bias_N = None if bias_N is None else bias_N.contiguous()
    return OUTPUT.run(x_TK, problem, x_TK.contiguous(), weight.contiguous(), bias_N, index, Grid(*grid), zeroed)  # type: ignore[no-any-return]


@_linear.register_fake
def _(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    index: Tensor,
    grid: list[int],
    zeroed: bool,
    dense_gradient: bool,
) -> Tensor:
    return x_TK.new_empty(x_TK.shape[0], grid[0] * grid[2])


@torch.library.custom_op("sparsetrain::block_sparse_linear_input_gradient", mutates_args=())
def _input_gradient(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: list[int], zeroed: bool) -> Tensor:
    problem = _problem(dy_TN, index, grid)
    return INPUT_GRADIENT.run(dy_TN, problem, dy_TN.contiguous(), weight.contiguous(), index, Grid(*grid), zeroed)  # type: ignore[no-any-return]


@_input_gradient.register_fake
def _(dy_TN: Tensor, weight: Tensor, index: Tensor, grid: list[int], zeroed: bool) -> Tensor:
    return dy_TN.new_empty(dy_TN.shape[0], grid[1] * grid[3])


@torch.library.custom_op("sparsetrain::block_sparse_linear_weight_gradient", mutates_args=())
def _weight_gradient(
    dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: list[int], packed: bool, dtype: torch.dtype
) -> Tensor:
    problem = _problem(x_TK, index, grid)
    arguments = dy_TN.contiguous(), x_TK.contiguous(), index, Grid(*grid), packed, dtype
    return WEIGHT_GRADIENT.run(x_TK, problem, *arguments)  # type: ignore[no-any-return]


@_weight_gradient.register_fake
def _(dy_TN: Tensor, x_TK: Tensor, index: Tensor, grid: list[int], packed: bool, dtype: torch.dtype) -> Tensor:
    if packed:
        return x_TK.new_empty((index.shape[0] - grid[0] - grid[1] - 2) // 3, grid[2], grid[3], dtype=dtype)
    return x_TK.new_empty(grid[0] * grid[2], grid[1] * grid[3], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight, _, index, ctx.grid, ctx.zeroed, ctx.dense_gradient = inputs
    ctx.save_for_backward(x_TK, weight, index)


def _backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
    x_TK, weight, index = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx = _input_gradient(dy_TN, weight, index, ctx.grid, ctx.zeroed) if needs_x else None
    dw = None
    if needs_weight and ctx.dense_gradient:
        dw = (dy_TN.T @ x_TK).to(weight.dtype)
    elif needs_weight:
        dw = _weight_gradient(dy_TN, x_TK, index, ctx.grid, weight.ndim == 3, weight.dtype)
    db = dy_TN.sum(0) if needs_bias else None
    return dx, dw, db, None, None, None, None


_linear.register_autograd(_backward, setup_context=_save)


def _problem(like_T: Tensor, index: Tensor, grid: list[int]) -> tuple[str, tuple[int, ...], float]:
    """Variant, sizes and density for the dispatcher."""
    num_rows, num_columns, block_rows, block_columns = grid
    num_blocks = (index.numel() - num_rows - num_columns - 2) // 3
    sizes = (like_T.shape[0], num_rows * block_rows, num_columns * block_columns)
    return f"{block_rows}x{block_columns}", sizes, num_blocks / (num_rows * num_columns)

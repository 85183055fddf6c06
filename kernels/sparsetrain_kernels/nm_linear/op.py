"""`nm_linear`: a linear layer with n:m sparse weights, and both gradients."""

from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.nm_linear.implementations import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT, variant_of
from sparsetrain_kernels.nm_linear.pattern import NMPattern
from sparsetrain_kernels.nm_linear.selection import NMSelection
from sparsetrain_kernels.precision import compute_dtype
from sparsetrain_kernels.tokens_last import are_tokens_last, fake_tokens, plain_tokens, store_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def nm_linear(
    x: Tensor,
    weight: Tensor,
    selection: NMSelection,
    bias: Tensor | None = None,
    *,
    zeroed: bool = False,
    dense_gradient: bool = False,
    tokens_last: bool = False,
) -> Tensor:
    """x Wᵀ + bias, where W is the weight with zeros outside what `selection` keeps.

    Which implementation computes it is the dispatcher's choice: see `sparsetrain_kernels.dispatch.explain`, operations
    nm_linear.output, .input_gradient and .weight_gradient with sizes (tokens, outputs, inputs).

    Args:
        x: Inputs [..., K] in float32, bfloat16, float16 or float64; cast to autocast's dtype where that is on.
        weight: Whole [N, K] or compressed [N, P] by `selection.compress`, cast to the dtype of the computation. What a
            whole one holds outside the selection is ignored.
        selection: The kept inputs of each output, on the device of x.
        bias: [N].
        zeroed: The caller knows that a whole weight is zero outside the selection, which spares a masking pass; a wrong
            promise gives wrong results.
        dense_gradient: Give a whole weight the gradient dyᵀ x everywhere (the straight-through estimator, what methods
            whose masks move need); otherwise it is zero outside the selection.
        tokens_last: Store the result in memory as [N, ...], its tokens along the rows. Patterns of vectors on a CPU
            read and write activations so without copying them, and elementwise operations keep them so. x may be
            stored either way; its gradient is stored as it is.

    Returns:
        [..., N] in the dtype of the computation.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or a compressed weight is asked for a dense gradient.
    """
    dtype = compute_dtype(x)
    compressed = _check(x, weight, selection, bias, dtype, dense_gradient)
    pattern = selection.pattern
    if not (x.is_cpu and pattern.vector > 1):
        weight = weight.to(dtype)  # once for all products; those of vectors on a CPU cast what they read
    y_TN: Tensor = _linear(
        x.to(dtype).reshape(-1, x.shape[-1]),
        weight,
        None if bias is None else bias.to(dtype),
        None if compressed else selection.mask_GK,
        selection.columns_GP if compressed or pattern.vector > 1 else None,
        [pattern.n, pattern.m, pattern.vector, selection.is_transposable],
        zeroed,
        dense_gradient,
        tokens_last,
    )
    return y_TN.view(*x.shape[:-1], y_TN.shape[1])


def _check(
    x: Tensor, weight: Tensor, selection: NMSelection, bias: Tensor | None, dtype: torch.dtype, dense_gradient: bool
) -> bool:
    """Whether the weight is compressed."""
    num_outputs, num_inputs = selection.shape
    num_kept = num_inputs // selection.pattern.m * selection.pattern.n
    if dtype not in DTYPES:
        raise ValueError(f"x is {dtype}: nm_linear computes in {', '.join(map(str, DTYPES))}; cast it")
    if tuple(weight.shape) not in ((num_outputs, num_inputs), (num_outputs, num_kept)):
        raise ValueError(
            f"weight is {list(weight.shape)}: the selection's is {[num_outputs, num_inputs]} whole or "
            f"{[num_outputs, num_kept]} compressed"
        )
    if x.ndim < 1 or x.shape[-1] != num_inputs:
        raise ValueError(f"x is {list(x.shape)}: its last dimension must be the selection's {num_inputs} inputs")
    if bias is not None and tuple(bias.shape) != (num_outputs,):
        raise ValueError(f"bias is {list(bias.shape)}: must be [{num_outputs}], the selection's outputs")
    compressed = weight.shape[1] != num_inputs
    if dense_gradient and compressed:
        raise ValueError("dense_gradient=True: a compressed weight holds only what is kept; pass a whole one")
    devices = {"x": x.device, "weight": weight.device, "selection": selection.mask_GK.device}
    if bias is not None:
        devices["bias"] = bias.device
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{places}: must be on one device; move with .to()")
    return compressed


@torch.library.custom_op("sparsetrain::nm_linear", mutates_args=())
def _linear(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    kind: list[int],
    zeroed: bool,
    dense_gradient: bool,
    tokens_last: bool,
) -> Tensor:
    pattern = NMPattern(*kind[:3])
    last = x_TK.is_cpu and (tokens_last or are_tokens_last(x_TK))
    problem = _problem(pattern, kind, mask_GK is None, last, (len(x_TK), len(weight), x_TK.shape[1]))
    bias_N = None if bias_N is None else bias_N.contiguous()
    arguments = plain_tokens(x_TK), weight.contiguous(), bias_N, mask_GK, columns_GP, pattern, zeroed, tokens_last
    return store_tokens(OUTPUT.run(x_TK, problem, *arguments), tokens_last)


@_linear.register_fake
def _(
    x_TK: Tensor,
    weight: Tensor,
    bias_N: Tensor | None,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    kind: list[int],
    zeroed: bool,
    dense_gradient: bool,
    tokens_last: bool,
) -> Tensor:
    return fake_tokens(x_TK, x_TK.shape[0], weight.shape[0], tokens_last)


@torch.library.custom_op("sparsetrain::nm_linear_input_gradient", mutates_args=())
def _input_gradient(
    dy_TN: Tensor,
    weight: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    kind: list[int],
    num_inputs: int,
    zeroed: bool,
    tokens_last: bool,
) -> Tensor:
    pattern = NMPattern(*kind[:3])
    last = dy_TN.is_cpu and (tokens_last or are_tokens_last(dy_TN))
    problem = _problem(pattern, kind, mask_GK is None, last, (len(dy_TN), len(weight), num_inputs))
    arguments = plain_tokens(dy_TN), weight.contiguous(), mask_GK, columns_GP, pattern, num_inputs, zeroed, tokens_last
    return store_tokens(INPUT_GRADIENT.run(dy_TN, problem, *arguments), tokens_last)


@_input_gradient.register_fake
def _(
    dy_TN: Tensor,
    weight: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    kind: list[int],
    num_inputs: int,
    zeroed: bool,
    tokens_last: bool,
) -> Tensor:
    return fake_tokens(dy_TN, dy_TN.shape[0], num_inputs, tokens_last)


@torch.library.custom_op("sparsetrain::nm_linear_weight_gradient", mutates_args=())
def _weight_gradient(
    dy_TN: Tensor,
    x_TK: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    kind: list[int],
    dtype: torch.dtype,
) -> Tensor:
    pattern, compressed = NMPattern(*kind[:3]), mask_GK is None
    last = x_TK.is_cpu and (are_tokens_last(x_TK) or are_tokens_last(dy_TN))
    problem = _problem(pattern, kind, compressed, last, (len(x_TK), dy_TN.shape[1], x_TK.shape[1]))
    arguments = plain_tokens(dy_TN), plain_tokens(x_TK), mask_GK, columns_GP, pattern, compressed, dtype
    return WEIGHT_GRADIENT.run(x_TK, problem, *arguments)  # type: ignore[no-any-return]


@_weight_gradient.register_fake
def _(
    dy_TN: Tensor,
    x_TK: Tensor,
    mask_GK: Tensor | None,
    columns_GP: Tensor | None,
    kind: list[int],
    dtype: torch.dtype,
) -> Tensor:
    num_values = x_TK.shape[1] if mask_GK is not None else x_TK.shape[1] // kind[1] * kind[0]
    return x_TK.new_empty(dy_TN.shape[1], num_values, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight, _, mask_GK, columns_GP, ctx.kind, ctx.zeroed, ctx.dense_gradient, _ = inputs
    ctx.save_for_backward(x_TK, weight, mask_GK, columns_GP)


def _backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
    x_TK, weight, mask_GK, columns_GP = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx = dw = None
    if needs_x:
        of_x = x_TK.shape[1], ctx.zeroed, are_tokens_last(x_TK)
        dx = _input_gradient(dy_TN, weight, mask_GK, columns_GP, ctx.kind, *of_x)
    if needs_weight and ctx.dense_gradient:
        dw = (dy_TN.T @ x_TK).to(weight.dtype)
    elif needs_weight:
        dw = _weight_gradient(dy_TN, x_TK, mask_GK, columns_GP, ctx.kind, weight.dtype)
    db = dy_TN.sum(0) if needs_bias else None
    return dx, dw, db, None, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_save)


def _problem(
    pattern: NMPattern, kind: list[int], compressed: bool, tokens_last: bool, sizes: tuple[int, int, int]
) -> tuple[str, tuple[int, ...], float]:
    """Variant, sizes (tokens, outputs, inputs) and density for the dispatcher."""
    is_transposable = bool(kind[3])
    variant = variant_of(pattern, compressed=compressed, transposable=is_transposable, tokens_last=tokens_last)
    return variant, sizes, pattern.density

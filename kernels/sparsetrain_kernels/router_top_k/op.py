"""`router_top_k` as an operator of torch, with its gradient.

Shapes: T tokens, E experts, K top-k.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.router_top_k import reference
from sparsetrain_kernels.row_backend import runs_triton


def router_top_k(logits_TE: Tensor, top_k: int, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The K largest of a softmax (arXiv 1701.06538, 2401.04088): on a GPU in one kernel; deterministic.

    Args:
        logits_TE: Floats; the result has their dtype.
        top_k: K, at most E.
        renormalise: Divide the weights by their sum over the chosen.

    Returns:
        weight_TK: By falling score; differentiable.
        expert_TK: int64. Of equal scores the first wins on a GPU; on a CPU it is not said which.

    Raises:
        ValueError: K is not in 1 to E, or logits are not floats of two dimensions.
    """
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        found = f"{logits_TE.dtype} of shape {tuple(logits_TE.shape)}"
        raise ValueError(f"logits_TE is {found}: expected floats of two dimensions, tokens and experts")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"top_k = {top_k}: expected 1 to {logits_TE.shape[1]}, the number of experts")
    weight_TK, expert_TK = torch.ops.sparsetrain.router_top_k(logits_TE, top_k, renormalise)
    return weight_TK, expert_TK


@torch.library.custom_op("sparsetrain::router_top_k", mutates_args=())
def _router_top_k(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    weight_TK, expert_TK = _backend(logits_TE).choose(logits_TE.contiguous(), top_k, renormalise)
    return weight_TK, expert_TK


@_router_top_k.register_fake
def _(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    weight_TK = logits_TE.new_empty(len(logits_TE), top_k)
    return weight_TK, weight_TK.new_empty(weight_TK.shape, dtype=torch.int64)


@torch.library.custom_op("sparsetrain::router_top_k_backward", mutates_args=())
def _router_top_k_backward(dweight_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, renormalise: bool) -> Tensor:
    backend = _backend(logits_TE)
    dlogits_TE: Tensor = backend.choose_backward(
        dweight_TK.contiguous(), logits_TE.contiguous(), expert_TK, renormalise
    )
    return dlogits_TE


@_router_top_k_backward.register_fake
def _(dweight_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, renormalise: bool) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _save(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    logits_TE, _, ctx.renormalise = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits_TE, output[1])


def _differentiate(ctx: Any, dweight_TK: Tensor, _: None) -> tuple[Tensor | None, ...]:
    logits_TE, expert_TK = ctx.saved_tensors
    return torch.ops.sparsetrain.router_top_k_backward(dweight_TK, logits_TE, expert_TK, ctx.renormalise), None, None


_router_top_k.register_autograd(_differentiate, setup_context=_save)


def _backend(logits_TE: Tensor) -> Any:
    return import_module("sparsetrain_kernels.router_top_k.triton") if runs_triton(logits_TE) else reference

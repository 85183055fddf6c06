"""Activations [T, X] that are stored tokens last: same shape, strides (1, T), so [X, T] in memory.

Products of sparse weights on a CPU copy whole features of all tokens so, and not many short pieces of each token.
Elementwise operations keep the order of their operands; to mix both orders costs most.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain_kernels.dispatch import Implementation, Problem
from sparsetrain_kernels.memory import new_result

TOKENS_LAST = "tokens last"
"""The dispatcher's word for problems with such activations, which take other times."""


def are_tokens_last(x_TX: Tensor) -> bool:
    """Whether activations are stored tokens last, and not tokens first."""
    return x_TX.T.is_contiguous() and not x_TX.is_contiguous()


def new_tokens(like: Tensor, num_tokens: int, num_features: int, tokens_last: bool) -> Tensor:
    """As `new_result`, activations in the order that is asked for."""
    return new_result(like, num_features, num_tokens).T if tokens_last else new_result(like, num_tokens, num_features)


def fake_tokens(like: Tensor, num_tokens: int, num_features: int, tokens_last: bool) -> Tensor:
    """As `new_tokens`, for what only tells shapes and strides."""
    return like.new_empty(num_features, num_tokens).T if tokens_last else like.new_empty(num_tokens, num_features)


def store_tokens(x_TX: Tensor, tokens_last: bool) -> Tensor:
    """Activations in the order that is asked for; themselves if they are in it."""
    return x_TX.T.contiguous().T if tokens_last else x_TX.contiguous()


def plain_tokens(x_TX: Tensor) -> Tensor:
    """Activations in either order, without gaps or repetitions in memory."""
    return x_TX if are_tokens_last(x_TX) else x_TX.contiguous()


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tokens_last: bool) -> Tensor:
    """x Wᵀ + bias [T, O] of a dense weight, in the order that is asked for."""
    if not tokens_last:
        return F.linear(x_TI, weight_OI, bias_O)
    return (weight_OI @ x_TI.T if bias_O is None else torch.addmm(bias_O[:, None], weight_OI, x_TI.T)).T


def outputs_last(problem: Problem) -> bool:
    """Whether a problem of tuning, of sizes tokens, outputs, inputs, has outputs stored tokens last: the wider ones."""
    return problem.variant.endswith(TOKENS_LAST) and problem.sizes[1] > problem.sizes[2]


def inputs_last(problem: Problem) -> bool:
    """Whether it has inputs stored so."""
    return problem.variant.endswith(TOKENS_LAST) and problem.sizes[1] < problem.sizes[2]


def random_outputs(problem: Problem) -> Tensor:
    """Activations [tokens, outputs] of such a problem."""
    drawn = torch.randn(problem.sizes[:2], device=problem.device, dtype=problem.dtype)
    return store_tokens(drawn, outputs_last(problem))


def random_inputs(problem: Problem) -> Tensor:
    """Activations [tokens, inputs] of such a problem."""
    drawn = torch.randn(problem.sizes[::2], device=problem.device, dtype=problem.dtype)
    return store_tokens(drawn, inputs_last(problem))


def reads_tokens_first(implementation: Implementation) -> Implementation:
    """One that is given all tensors row by row."""

    def run(*arguments: Any) -> Any:
        return implementation.run(*(a.contiguous() if isinstance(a, Tensor) else a for a in arguments))

    return replace(implementation, run=run)


def knows_tokens_first(implementation: Implementation) -> Implementation:
    """One that reads tokens first and is not told the order of its result, the last argument of others.

    It writes tokens first, and the operator stores that anew where another order is asked for.
    """
    first = reads_tokens_first(implementation)

    def run(*arguments: Any) -> Any:
        *others, _ = arguments
        return first.run(*others)

    return replace(implementation, run=run)

"""Activations [T, X] that are stored tokens last: same shape, strides (1, T), so [X, T] in memory.

Products of sparse weights on a CPU copy whole features of all tokens so, and not many short pieces of each token.
Elementwise operations keep the order of their operands; to mix both orders costs most.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsetrain_kernels.dispatch import Implementation
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

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
    """Activations without gaps or repetitions in memory: on a CPU in either order, elsewhere tokens first."""
    return x_TX if x_TX.is_cpu and are_tokens_last(x_TX) else x_TX.contiguous()


def writes_tokens_first(implementation: Implementation) -> Implementation:
    """One that is not told the order, the last argument of others: the operator stores its result anew if it must."""

    def run(*arguments: Any) -> Any:
        *others, _ = arguments
        return implementation.run(*others)

    return replace(implementation, run=run)

"""Rows in the order of their tokens.

Shapes: T tokens, R rows.
"""

import torch
from torch import Tensor


def rows_by_token(token_R: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The rows of each token, one token after the other.

    Returns:
        row_R: int64, rows sorted by token; those of one token in ascending order.
        first_T: int64 [T + 1], where in `row_R` a token's rows begin; its last entry is R.
    """
    first_T = torch.zeros(num_tokens + 1, dtype=torch.int64, device=token_R.device)
    first_T.scatter_add_(0, token_R + 1, torch.ones_like(token_R))
    return torch.argsort(token_R, stable=True), first_T.cumsum_(0)

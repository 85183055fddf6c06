"""Permutation in plain torch: what the other implementations are held against, and the one for CPUs.

Shapes: T tokens, R rows, D model dim.
"""

import torch
from torch import Tensor

from sparsetrain_kernels.permute.by_token import rows_by_token


def gather(x_TD: Tensor, token_R: Tensor) -> Tensor:
    """Row r is x[token_R[r]]."""
    return x_TD.index_select(0, token_R)


def combine(y_RD: Tensor, weight_R: Tensor | None, token_R: Tensor, num_tokens: int) -> Tensor:
    """A token's rows, multiplied by their weights and added up in the order of rows; [T, D] in the dtype of y."""
    if len(y_RD) == 0:
        return y_RD.new_zeros(num_tokens, y_RD.shape[1])
    row_R, first_T = rows_by_token(token_R, num_tokens)
    weight = None if weight_R is None else weight_R.to(y_RD.dtype).index_select(0, row_R)
    # A sum over bags of rows reads each row once; adding rows to an output one by one is several times slower.
    summed: Tensor = torch.embedding_bag(
        y_RD, row_R, first_T, mode=0, per_sample_weights=weight, include_last_offset=True
    )[0]
    return summed


def combine_backward(dy_TD: Tensor, y_RD: Tensor, weight_R: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `combine` by rows, in their dtype, and by weights, in theirs."""
    dy_RD = dy_TD.index_select(0, token_R)
    dweight_R = torch.linalg.vecdot(dy_RD, y_RD).to(weight_R.dtype)
    return dy_RD.mul_(weight_R.to(dy_RD.dtype).unsqueeze(1)), dweight_R

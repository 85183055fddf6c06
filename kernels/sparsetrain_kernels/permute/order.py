"""Rows in the order of their experts.

Shapes: T tokens, K top-k, E experts, R rows: a row is one assignment of a token to an expert.
"""

from importlib import import_module

import torch
from torch import Tensor

from sparsetrain_kernels.row_backend import runs_triton


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order the assignments of tokens to experts as rows, by expert and then by token; nothing waits for a GPU.

    Args:
        expert_TK: Integers, the K experts of each token.
        num_experts: E.

    Returns:
        token_R: int64, the token of each row.
        row_of_TK: int64, the row of each assignment: `values_TK.flatten()` scattered to it are in row order.
        counts_E: int64, rows of each expert.

    Raises:
        ValueError: Not integers of two dimensions, or E is not positive.
    """
    if expert_TK.dim() != 2 or expert_TK.is_floating_point() or expert_TK.dtype == torch.bool:
        found = f"{expert_TK.dtype} of shape {tuple(expert_TK.shape)}"
        raise ValueError(f"expert_TK is {found}: expected integers of two dimensions, tokens and their experts")
    if num_experts < 1:
        raise ValueError(f"num_experts = {num_experts}: expected at least 1")
    token_R, row_of_TK, counts_E = torch.ops.sparsetrain.sort_by_expert(expert_TK, num_experts)
    return token_R, row_of_TK, counts_E


@torch.library.custom_op("sparsetrain::sort_by_expert", mutates_args=())
def _sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_A, top_k = expert_TK.flatten(), expert_TK.shape[1]
    if runs_triton(expert_A):
        kernels = import_module("sparsetrain_kernels.permute.triton")
        token_R, row_A, counts_E = kernels.rows_of_assignments(expert_A, num_experts, top_k)
        return token_R, row_A.view(expert_TK.shape), counts_E
    order_R = torch.argsort(expert_A, stable=True)
    row_A = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_A.device)
    counts_E.scatter_add_(0, expert_A.to(torch.int64), torch.ones_like(order_R))
    return order_R // top_k, row_A.view(expert_TK.shape), counts_E


@_sort_by_expert.register_fake
def _(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    row_of_TK = expert_TK.new_empty(expert_TK.shape, dtype=torch.int64)
    return row_of_TK.new_empty(expert_TK.numel()), row_of_TK, row_of_TK.new_empty(num_experts)

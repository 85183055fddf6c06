"""Permutation on a GPU in Triton: each row or token is written by one program, which adds in the order of rows.

Nothing waits for the host. Shapes: T tokens, R rows, D model dim, A assignments, E experts, B blocks of assignments.
"""

import torch
import triton
from torch import Tensor

from sparsetrain_kernels.current_device import on_its_device
from sparsetrain_kernels.permute import triton_kernels as kernels
from sparsetrain_kernels.permute.by_token import rows_by_token


@on_its_device
def gather(x_TD: Tensor, token_R: Tensor) -> Tensor:
    """Row r is x[token_R[r]]."""
    out_RD = x_TD.new_empty(len(token_R), x_TD.shape[1])
    if out_RD.numel() > 0:
        block = _block(x_TD)
        programs = len(token_R), triton.cdiv(x_TD.shape[1], block)
        kernels.gather_kernel[programs](x_TD, token_R, out_RD, x_TD.shape[1], BLOCK_D=block)
    return out_RD


@on_its_device
def combine(y_RD: Tensor, weight_R: Tensor | None, token_R: Tensor, num_tokens: int) -> Tensor:
    """A token's rows, multiplied by their weights and added up in float32; [T, D] in the dtype of y."""
    row_R, first_T = rows_by_token(token_R, num_tokens)
    out_TD = y_RD.new_empty(num_tokens, y_RD.shape[1])
    if out_TD.numel() > 0:
        block = _block(y_RD)
        programs = num_tokens, triton.cdiv(y_RD.shape[1], block)
        kernels.combine_kernel[programs](y_RD, weight_R, row_R, first_T, out_TD, y_RD.shape[1], BLOCK_D=block)
    return out_TD


@on_its_device
def combine_backward(dy_TD: Tensor, y_RD: Tensor, weight_R: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `combine` by rows, in their dtype, and by weights, in theirs."""
    dy_RD, dweight_R = torch.empty_like(y_RD), torch.empty_like(weight_R)
    if len(token_R) > 0:
        kernels.combine_backward_kernel[len(token_R),](
            dy_TD, y_RD, weight_R, token_R, dy_RD, dweight_R, y_RD.shape[1], BLOCK_D=_block(y_RD)
        )
    return dy_RD, dweight_R


@on_its_device
def rows_of_assignments(expert_A: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each assignment goes when they are ordered by expert, and then as they are.

    Args:
        expert_A: Integers in [0, E).
        num_experts: E.
        top_k: How many assignments in a row belong to a token.

    Returns:
        token_R: int64 [A], the token of each row.
        row_A: int64, the row of each assignment.
        counts_E: int64, rows of each expert.
    """
    padded = triton.next_power_of_2(max(num_experts, 2))
    block = max(16, 4096 // padded)
    num_blocks = triton.cdiv(len(expert_A), block)
    counts_BE = expert_A.new_empty(num_blocks, num_experts, dtype=torch.int64)
    token_R, row_A = (expert_A.new_empty(len(expert_A), dtype=torch.int64) for _ in range(2))
    sizes = {"BLOCK_A": block, "E_PADDED": padded}
    if num_blocks > 0:
        kernels.count_kernel[num_blocks,](expert_A, counts_BE, len(expert_A), num_experts, **sizes)
    counts_E = counts_BE.sum(0)
    first_BE = (counts_E.cumsum(0) - counts_E) + (counts_BE.cumsum(0) - counts_BE)
    if num_blocks > 0:
        kernels.place_kernel[num_blocks,](
            expert_A, first_BE, token_R, row_A, len(expert_A), num_experts, TOP_K=top_k, **sizes
        )
    return token_R, row_A, counts_E


def _block(x: Tensor) -> int:
    return min(1024, int(triton.next_power_of_2(max(x.shape[1], 1))))

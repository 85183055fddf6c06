"""Grouped products in plain torch: what the other implementation is held against, and the one for CPUs.

Shapes: R rows, E groups, K inputs, N outputs, M rows of an outer product.
"""

import torch
from torch import Tensor


def by_rows(a_RK: Tensor, b_EKN: Tensor, offs_E: Tensor) -> Tensor:
    """a b[e] for the rows of each group; [R, N]."""
    out_RN = a_RK.new_empty(len(a_RK), b_EKN.shape[2])
    for rows, b_KN in zip(_groups(offs_E, len(a_RK)), b_EKN, strict=True):
        torch.mm(a_RK[rows], b_KN, out=out_RN[rows])
    return out_RN


def over_rows(a_MR: Tensor, b_RN: Tensor, offs_E: Tensor) -> Tensor:
    """a b, summed over the rows of each group alone; [E, M, N]."""
    out_EMN = a_MR.new_empty(len(offs_E), len(a_MR), b_RN.shape[1])
    for rows, out_MN in zip(_groups(offs_E, len(b_RN)), out_EMN, strict=True):
        torch.mm(a_MR[:, rows], b_RN[rows], out=out_MN)
    return out_EMN


def _groups(offs_E: Tensor, num_rows: int) -> list[slice]:
    ends = offs_E.tolist()
    starts = [0, *ends[:-1]]
    if any(end < start for start, end in zip(starts, ends, strict=True)) or (ends and ends[-1] != num_rows):
        raise ValueError(f"offs = {ends}: expected ends of groups that ascend to the number of rows, {num_rows}")
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]

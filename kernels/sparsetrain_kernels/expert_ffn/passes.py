"""The forward and backward pass on stacked weights, by what the device runs; without autograd.

Shapes: T tokens, R rows, P rows rounded up, E experts, D model dim, F hidden dim, H = 2F for SwiGLU (gate rows, then up
rows), F for GELU.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.blocks import Weights
from sparsetrain_kernels.expert_ffn.by_expert import backward_of_rows, forward_of_rows
from sparsetrain_kernels.expert_ffn.fused import moe_backward, moe_forward
from sparsetrain_kernels.expert_ffn.matrices import stacked
from sparsetrain_kernels.memory import new_result
from sparsetrain_kernels.row_backend import runs_triton

Stacks = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""w_in [E, H, D], w_out [E, D, F], b_in [E, H] and b_out [E, D], or gradients by them."""


def rows_forward(x_RD: Tensor, counts_E: Tensor, stacks: Stacks, activation: str) -> tuple[Tensor, Tensor]:
    """The experts' outputs [R, D], and their hidden activations before the nonlinearity [P, H]."""
    if not runs_triton(x_RD):
        return forward_of_rows(x_RD, counts_E.tolist(), Weights.unstack(*stacks), activation)
    ends_E = _ends(counts_E, len(x_RD))
    y_RD, h_RH = _triton().forward(x_RD.contiguous(), None, ends_E, len(x_RD), stacked(*stacks), activation)
    return y_RD, h_RH


def rows_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    h_PH: Tensor,
    counts_E: Tensor,
    stacks: Stacks,
    activation: str,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients by x and by every weight that there is; the latter in `dtype`, or left out if it is None."""
    if not runs_triton(x_RD):
        counts = counts_E.tolist()
        gradients = _new_gradients(counts, dtype, *stacks)
        into = Weights.unstack(*gradients) if gradients else None
        weights = Weights.unstack(*stacks)
        return [backward_of_rows(dy_RD, x_RD, h_PH, counts, weights, activation, into, add=False), *_present(gradients)]
    dy_RD, x_RD = dy_RD.to(x_RD.dtype).contiguous(), x_RD.contiguous()
    gradients = _new_gradients((), dtype, *stacks)
    written = stacked(*gradients) if gradients else None
    ends_E = _ends(counts_E, len(x_RD))
    dx_RD = _triton().backward(dy_RD, x_RD, None, h_PH, ends_E, stacked(*stacks), activation, written, add=False)
    return [dx_RD, *_present(gradients)]


def tokens_forward(
    x_TD: Tensor, token_R: Tensor, weight_R: Tensor, counts_E: Tensor, stacks: Stacks, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over a token's rows of weight · expert(x) [T, D]; hidden activations [P, H] and the experts' outputs [P, D]."""
    if not runs_triton(x_TD):
        return moe_forward(x_TD, token_R, weight_R, counts_E.tolist(), Weights.unstack(*stacks), activation)
    ends_E, x_TD, token_R = _ends(counts_E, len(token_R)), x_TD.contiguous(), token_R.contiguous()
    y_RD, h_RH = _triton().forward(x_TD, token_R, ends_E, len(token_R), stacked(*stacks), activation)
    return _rows().combine(y_RD, weight_R.contiguous(), token_R, len(x_TD)), h_RH, y_RD


def tokens_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_PH: Tensor,
    y_PD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    stacks: Stacks,
    activation: str,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients by x, `weight_R` and every weight that there is; the last in `dtype`, or left out if it is None."""
    dy_TD = dy_TD.to(x_TD.dtype)
    if not runs_triton(x_TD):
        counts = counts_E.tolist()
        gradients = _new_gradients(counts, dtype, *stacks)
        into = Weights.unstack(*gradients) if gradients else None
        weights = Weights.unstack(*stacks)
        dx, dweight = moe_backward(dy_TD, x_TD, h_PH, y_PD, token_R, weight_R, counts, weights, activation, into)
        return [dx, dweight, *_present(gradients)]
    ends_E, x_TD, token_R = _ends(counts_E, len(token_R)), x_TD.contiguous(), token_R.contiguous()
    dy_RD, dweight_R = _rows().combine_backward(dy_TD.contiguous(), y_PD, weight_R.contiguous(), token_R)
    gradients = _new_gradients((), dtype, *stacks)
    written = stacked(*gradients) if gradients else None
    dx_RD = _triton().backward(dy_RD, x_TD, token_R, h_PH, ends_E, stacked(*stacks), activation, written, add=False)
    return [_rows().combine(dx_RD, None, token_R, len(x_TD)), dweight_R, *_present(gradients)]


def _triton() -> Any:
    return import_module("sparsetrain_kernels.expert_ffn.triton")


def _rows() -> Any:
    return import_module("sparsetrain_kernels.permute.triton")


def _ends(counts_E: Tensor, num_rows: int) -> Tensor:
    """One past each expert's last row. Counts that exceed R are not noticed, but no other memory is touched."""
    return counts_E.cumsum(0, dtype=torch.int32).clamp_(max=num_rows)


def _new_gradients(counts: Sequence[int], dtype: torch.dtype | None, *weights: Tensor | None) -> Any:
    """Memory for the gradients of weights, zero for experts that have no rows by `counts`; nothing where dtype is None.

    Triton's kernels write zeros themselves, and the host does not know the counts.
    """
    if dtype is None:
        return ()
    stacks = tuple(None if w is None else new_result(w, *w.shape, dtype=dtype) for w in weights)
    for expert, count in enumerate(counts):
        if count == 0:
            for stack in _present(stacks):
                stack[expert].zero_()
    return stacks


def _present(tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]

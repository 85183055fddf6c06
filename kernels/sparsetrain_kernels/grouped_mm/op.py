"""`grouped_mm` as an operator of torch, with its gradients.

Shapes: R rows, E groups, K inputs, N outputs, M rows of an outer product.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsetrain_kernels.expert_ffn.matrices import Matrices
from sparsetrain_kernels.grouped_mm import reference
from sparsetrain_kernels.row_backend import runs_triton


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` for ragged groups of rows, differentiable and deterministic.

    With b of three dimensions, the rows of group e are multiplied by b[e]; with b of two, a b is summed over the rows
    of each group alone. On a GPU all groups run in one Triton kernel that needs no host and no alignment of sizes;
    there, `offs` that do not end at R are not noticed: rows beyond the last group are not written.

    Args:
        a: [R, K], or [M, R]. Floats of at most 32 bits on a GPU.
        b: [E, K, N], or [R, N]; in the dtype of a, of any strides.
        offs: int32 [E], one past the last row of each group; they ascend to R. Groups may be empty.

    Returns:
        [R, N], or [E, M, N], zero for empty groups; in the dtype of a.

    Raises:
        ValueError: Shapes or dtypes that do not fit each other; on a CPU, `offs` that do not ascend to R.
    """
    _check(a, b, offs)
    out: Tensor = torch.ops.sparsetrain.grouped_mm(a, b, offs)
    return out


def _check(a: Tensor, b: Tensor, offs: Tensor) -> None:
    if a.dim() != 2 or b.dim() not in (2, 3):
        raise ValueError(f"a and b have {a.dim()} and {b.dim()} dimensions: expected 2 and 3, or 2 and 2")
    if a.shape[1] != b.shape[-2]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit: {a.shape[1]} is not {b.shape[-2]}")
    if a.dtype != b.dtype:
        raise ValueError(f"a is {a.dtype} and b {b.dtype}: expected one dtype")
    if offs.dtype != torch.int32 or offs.dim() != 1 or (b.dim() == 3 and len(offs) != len(b)):
        groups = len(b) if b.dim() == 3 else "E"
        raise ValueError(f"offs is {offs.dtype} of shape {tuple(offs.shape)}: expected int32 of shape ({groups},)")


@torch.library.custom_op("sparsetrain::grouped_mm", mutates_args=())
def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    if not runs_triton(a):
        return reference.by_rows(a, b, offs) if b.dim() == 3 else reference.over_rows(a, b, offs)
    kernels = import_module("sparsetrain_kernels.expert_ffn.triton")
    if b.dim() == 3:
        by_rows: Tensor = kernels.grouped_product(a.contiguous(), Matrices(b), offs.clamp(max=len(a)), None)
        return by_rows
    left, offs = a.mT.contiguous(), offs.clamp(max=len(b))
    over_rows = a.new_empty(len(offs), len(a), b.shape[1])
    kernels.grouped_outer_product(left, b.contiguous(), None, offs, Matrices(over_rows), None, add=False)
    return over_rows


@_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2]) if b.dim() == 3 else a.new_empty(len(offs), a.shape[0], b.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offs = ctx.saved_tensors
    product = torch.ops.sparsetrain.grouped_mm
    if b.dim() == 3:
        da = product(dout, b.mT, offs) if ctx.needs_input_grad[0] else None
        db = product(a.mT, dout, offs) if ctx.needs_input_grad[1] else None
    else:
        da = product(b, dout.mT, offs).mT if ctx.needs_input_grad[0] else None
        db = product(a.mT, dout, offs) if ctx.needs_input_grad[1] else None
    return da, db, None


_grouped_mm.register_autograd(_differentiate, setup_context=_save)

"""Comparison with tolerances by dtype, in one table."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (2e-3, 2e-3),
}
"""(relative, absolute) by the less precise of the two dtypes."""


def assert_close(actual: Tensor, expected: Tensor, *, rtol: float | None = None, atol: float | None = None) -> None:
    """Fail unless two tensors have the same shape and nearly the same values; NaN equals nothing.

    Args:
        actual: Any floating dtype; a DTensor is gathered first.
        expected: The oracle, of the same or a more precise dtype.
        rtol: Relative tolerance; default by dtype.
        atol: Absolute tolerance; default by dtype.
    """
    actual, expected = _whole(actual), _whole(expected)
    coarser = max((actual.dtype, expected.dtype), key=lambda dtype: TOLERANCES[dtype][0])
    default_rtol, default_atol = TOLERANCES[coarser]
    torch.testing.assert_close(
        actual.double().cpu(),
        expected.double().cpu(),
        rtol=default_rtol if rtol is None else rtol,
        atol=default_atol if atol is None else atol,
    )


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

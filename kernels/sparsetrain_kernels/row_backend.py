"""Which implementation of the operators on rows of experts runs: Triton's on a GPU, else torch's own operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

RowBackend = Literal["triton", "torch"]

_forced: RowBackend | None = None


def runs_triton(like: Tensor) -> bool:
    """Whether Triton computes with this tensor: on a GPU, unless it is float64, which its products do not have."""
    if _forced is not None:
        return _forced == "triton"
    return like.is_cuda and like.dtype != torch.float64 and find_spec("triton") is not None


@contextmanager
def force_rows(backend: RowBackend) -> Iterator[None]:
    """Inside, one of them computes whatever the device is: for tests and measurements.

    Raises:
        ValueError: There is no such backend.
    """
    global _forced
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend = {backend!r}: expected triton or torch")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before

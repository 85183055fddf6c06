"""Memory of large results."""

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

_SMALLEST_BYTES = 4 * 2**20
_PAGE_BYTES = 4096
_MADV_HUGEPAGE = 14


def new_result(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on the device of `like`, of its dtype unless another is given.

    On a Linux CPU, huge pages are asked for where it is large: otherwise the kernel maps and zeroes it 4 KiB at a time
    when it is first written, which takes several times as long as the writing.
    """
    result = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if result.is_cpu and sys.platform == "linux" and result.nbytes >= _SMALLEST_BYTES:
        first = -(-result.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
        # A hint: a kernel that does not know it refuses it, and nothing is lost.
        _libc().madvise(first, (result.data_ptr() + result.nbytes - first) // _PAGE_BYTES * _PAGE_BYTES, _MADV_HUGEPAGE)
    return result


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc

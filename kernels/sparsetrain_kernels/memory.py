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


def new_tokens(like: Tensor, num_tokens: int, num_features: int, tokens_last: bool) -> Tensor:
    """As `new_result`: activations [T, X], in memory as they are or transposed."""
    return new_result(like, num_features, num_tokens).T if tokens_last else new_result(like, num_tokens, num_features)


def store_tokens(x_TX: Tensor, tokens_last: bool) -> Tensor:
    """Activations [T, X] as `new_tokens` would store them; themselves if they are."""
    return x_TX.T.contiguous().T if tokens_last else x_TX.contiguous()


def are_tokens_last(x_TX: Tensor) -> bool:
    """Whether activations [T, X] are in memory transposed, and not as they are."""
    return x_TX.T.is_contiguous() and not x_TX.is_contiguous()


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc

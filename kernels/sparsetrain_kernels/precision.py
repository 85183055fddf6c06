"""Which dtype matrix products run in, and how exactly."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run in its interpreter, on a CPU."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype of x's device where autocast is on, else x's own.

    Operations that autocast leaves alone ask this, so that an activation is cast once and not by each of its readers.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products and softmax run in the dtypes of their arguments, autocast or not."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def of_triton_products(a: Tensor) -> dict[str, object]:
    """How kernels multiply tensors like this, PRECISION and UPCAST: as torch would on a GPU.

    The interpreter multiplies the raw bits of bfloat16, so there tensors are cast to float32 before.
    """
    # Of torch's two settings of TF32 this one may be read whichever of them was set.
    tf32 = a.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": INTERPRETED}

"""Which dtype matrix products run in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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

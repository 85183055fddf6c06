"""Which dtype matrix products run in."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype of x's device where autocast is on, else x's own.

    Operations that autocast leaves alone ask this, so that an activation is cast once and not by each of its readers.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

"""Marks for tests that need hardware."""

import pytest
import torch


def requires_gpu(test):  # type: ignore[no-untyped-def]
    """Mark a test `gpu` and skip it where there is no CUDA device."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))

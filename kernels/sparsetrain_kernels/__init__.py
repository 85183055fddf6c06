"""Kernels for sparse training that are imported for their own sake: torch and triton only."""

from sparsetrain_kernels.block_layout import BlockLayout

__all__ = ["BlockLayout"]

"""Matrix products of groups of rows, each with a matrix of its own."""

from sparsetrain_kernels.grouped_mm.op import grouped_mm

__all__ = ["grouped_mm"]

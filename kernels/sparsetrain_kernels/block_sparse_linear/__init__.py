"""A linear layer whose weight lives in blocks.

layout.py      WeightBlocks: which blocks live, and the packed form of the weight
reference.py   the oracle: expand and multiply densely
dense.py       the three products on whole weights
gather.py      the three products on a CPU, living blocks only
triton.py      the same on a GPU
implementations.py  the three as operations of the dispatcher
op.py          the operator: registration, autograd, checks
"""

from sparsetrain_kernels.block_sparse_linear.layout import WeightBlocks
from sparsetrain_kernels.block_sparse_linear.op import block_sparse_linear

__all__ = ["WeightBlocks", "block_sparse_linear"]

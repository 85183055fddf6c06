"""Linear layers that keep n of every m inputs.

pattern.py     NMPattern: n, m, and how many outputs share their inputs
masks.py       which weights are kept: magnitudes, transposable masks, the fast 2:4 tournament
selection.py   NMSelection: the kept inputs of one weight; compressing and expanding
sparsify.py    2:4 mask and compressed form at once
reference.py   the oracle: mask and multiply densely
dense.py       the three products on whole weights
gather.py      vector n:m on a CPU
bag.py         compressed n:m for few tokens on a CPU
semi_structured.py  2:4 on sparse tensor cores
triton.py      vector n:m and the sparsifier on a GPU
implementations.py  the products as operations of the dispatcher
op.py          the operator: registration, autograd, checks
module.py      NMLinear
"""

from sparsetrain_kernels.nm_linear.masks import magnitude_mask, transposable_mask
from sparsetrain_kernels.nm_linear.module import NMLinear
from sparsetrain_kernels.nm_linear.op import nm_linear
from sparsetrain_kernels.nm_linear.pattern import NMPattern
from sparsetrain_kernels.nm_linear.selection import NMSelection
from sparsetrain_kernels.nm_linear.sparsify import sparsify_2_4

__all__ = [
    "NMLinear",
    "NMPattern",
    "NMSelection",
    "magnitude_mask",
    "nm_linear",
    "sparsify_2_4",
    "transposable_mask",
]
